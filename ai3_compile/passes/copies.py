"""copies: a copy in inference that nothing can tell from what it copies is left out, as dropout leaves one behind.

y = clone(x); z = linear(y, w)  ->  z = linear(x, w)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .context import Context

aten = torch.ops.aten
_MAY_RETURN_ITS_ARGUMENT = (
    aten.reshape.default,
    aten.contiguous.default,
    aten._unsafe_view.default,
    aten.lift_fresh.default,
)


def run(graph: Graph, context: Context) -> None:
    if not context.is_inference:
        return
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten.clone.default and _is_idle(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_idle(node: Node) -> bool:
    """Whether the copy has the layout of what it copies, and all that read it compute something of their own: a graph
    whose inputs are functional writes into neither, and no output becomes a view of an input."""
    source: Any = node.args[0]
    return (
        node.kwargs.get("memory_format") in (None, torch.preserve_format)
        and node.meta["val"].stride() == source.meta["val"].stride()
        and all(_computes(user) for user in node.users)
    )


def _computes(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.is_view:
        return False
    return target not in _MAY_RETURN_ITS_ARGUMENT and not target._schema.is_mutable
