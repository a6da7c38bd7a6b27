"""decompose: what was kept whole for fold and fuse, and stayed, becomes what Inductor would have made of it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from .context import Context, value_of

aten = torch.ops.aten
BATCH_NORM = aten._native_batch_norm_legit_no_training.default
ACTIVATIONS = (
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.silu.default,
    aten.gelu.default,
)
# Without the rule that Inductor has for it, it is traced as the hardtanh that it is made of.
RELU6 = aten.relu6.default


def run(graph: Graph, context: Context) -> None:
    if context.decompose:
        decompose_all(graph)


def decompose_all(graph: Graph) -> None:
    """Also for graphs that ai3 leaves alone: Inductor has no rule for what its table was to take apart."""
    for target in (BATCH_NORM, *ACTIVATIONS):
        for node in graph.find_nodes(op="call_function", target=target):
            _decompose(node)


def _decompose(node: Node) -> None:
    def call(*args: Any) -> Any:
        assert callable(node.target)
        return node.target(*args, **node.kwargs)

    traced = make_fx(call, decomposition_table=select_decomp_table())(*value_of(node.args))
    inputs = [placeholder for placeholder in traced.graph.nodes if placeholder.op == "placeholder"]
    with node.graph.inserting_before(node):
        outputs = node.graph.graph_copy(traced.graph, dict(zip(inputs, node.args)))  # type: ignore[arg-type]
    if isinstance(outputs, (tuple, list)):
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
            node.graph.erase_node(user)
    else:
        node.replace_all_uses_with(outputs)  # type: ignore[arg-type]
    node.graph.erase_node(node)
