"""left: what the passes leave to torch."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node


def left_to_torch(graph: Graph) -> list[Node]:
    """The operations that are not ai3's and write memory: what compute something, and copies."""
    return [node for node in graph.nodes if node.op == "call_function" and _writes_memory(node)]


def _writes_memory(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False  # getitem, arithmetic on sizes
    returns_tensors = any(str(value.type) in ("Tensor", "List[Tensor]") for value in target._schema.returns)
    return target.namespace != "ai3" and not target.is_view and returns_tensors
