"""copies: a copy in inference that nothing can tell from what it copies is left out, as dropout leaves one behind.

y = clone(x); z = linear(y, w)  ->  z = linear(x, w)

So is an adaptive average pooling to the size that the image has, as in AlexNet and VGG on the images they are made for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ..ops.base import shape_of
from .context import Context, is_ai3, only_user

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
        elif _averages_nothing(node, context):
            context.report.left_out(node, "the image has that size already")
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _averages_nothing(node: Node, context: Context) -> bool:
    """Whether a pooling that the user has left to the policy gives the image it gets, which nothing else reads."""
    if not (is_ai3(node, "ai3::adaptive_avg_pool2d") or node.target is aten._adaptive_avg_pool2d.default):
        return False
    source, policy = node.args[0], context.policy
    assert isinstance(source, Node)
    if node in context.swapped or not policy.fuse or not policy.is_default("adaptiveavgpool2d"):
        return False
    mine, its = node.meta["val"], source.meta["val"]
    if not all(isinstance(size, int) for size in its.shape[-2:]) or shape_of(node)[-2:] != shape_of(source)[-2:]:
        return False
    return _computes(source) and only_user(source) is node and mine.stride() == its.stride()


def _is_idle(node: Node) -> bool:
    """Whether the copy has the layout of what it copies, and all that read it compute something of their own: a graph
    whose inputs are functional writes into neither, and no output becomes a view of an input."""
    source: Any = node.args[0]
    same = node.meta["val"].stride() == source.meta["val"].stride()
    return same and all(_computes(user) for user in node.users)


def _computes(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.is_view:
        return False
    return target not in _MAY_RETURN_ITS_ARGUMENT and not target._schema.is_mutable
