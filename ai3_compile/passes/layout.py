"""layout: images stay channels_last between ai3's operations, and change layout only where something else needs it.

Operations that do not care (elementwise ones, concatenation, pooling) let channels_last through. Before every other
operation, and at the outputs, the layout that the graph had without ai3 is restored.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import registry
from .context import Context, algorithm_of, eager_value, is_ai3, restored, set_value, strides_of

aten = torch.ops.aten
IMAGE_OPERATIONS = ("ai3::conv2d", "ai3::max_pool2d", "ai3::avg_pool2d", "ai3::adaptive_avg_pool2d")
# Besides what PyTorch tags as pointwise, and Inductor's own operations, whose strides it plans itself. None is a view,
# so that what a user gets back is dense wherever it was.
AGNOSTIC = {
    operator.getitem,
    aten.cat.default,
    aten.convolution.default,
    aten.mean.dim,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.max_pool2d_with_indices.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.constant_pad_nd.default,
}


def run(graph: Graph, context: Context) -> None:
    if not any(is_ai3(node, *IMAGE_OPERATIONS) for node in graph.nodes):
        return
    before = {node: eager_value(node) for node in graph.nodes}
    copies: dict[tuple[Node, torch.memory_format], Node] = {}

    def copy_of(source: Node, memory_format: torch.memory_format, user: Node) -> Node:
        """`source` in another layout, made once, right before its first user."""
        key = (source, memory_format)
        if key not in copies:
            with graph.inserting_before(user):
                copies[key] = graph.call_function(aten.clone.default, (source,), {"memory_format": memory_format})
            set_value(copies[key])
        return copies[key]

    for node in list(graph.nodes):
        if node.op == "output":
            for argument in node.all_input_nodes:
                if strides_of(argument.meta.get("val")) != strides_of(before.get(argument)):
                    node.replace_input_with(argument, restored(argument, before[argument], node, copy_of))
        if node.op != "call_function":
            continue
        if is_ai3(node, *IMAGE_OPERATIONS):
            if node.meta["val"].dim() == 4 and _prefers_channels_last(node, context):
                node.kwargs = {**node.kwargs, "channels_last": True}
                for argument in _images_among(node):
                    if not argument.meta["val"].is_contiguous(memory_format=torch.channels_last):
                        node.replace_input_with(argument, copy_of(argument, torch.channels_last, node))
        elif not is_ai3(node) and not _is_agnostic(node):
            for argument in node.all_input_nodes:
                if strides_of(argument.meta.get("val")) != strides_of(before.get(argument)):
                    node.replace_input_with(argument, copy_of(argument, torch.contiguous_format, node))
        if is_ai3(node) or any(_changed(argument, before) for argument in node.all_input_nodes):
            set_value(node)


def _prefers_channels_last(node: Node, context: Context) -> bool:
    algorithm = context.algorithms[algorithm_of(node)]
    return registry.platforms()[algorithm.platform].prefers_channels_last(algorithm)


def _images_among(node: Node) -> list[Node]:
    """The image inputs of one of ai3's operations: not its weights."""
    candidates = (node.args[0], node.kwargs.get("residual"))
    return [argument for argument in candidates if isinstance(argument, Node)]


def _is_agnostic(node: Node) -> bool:
    target = node.target
    if target in AGNOSTIC:
        return True
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or target.namespace in ("prims", "inductor")
    )


def _changed(node: Node, before: dict[Node, Any]) -> bool:
    return node not in before or strides_of(node.meta.get("val")) != strides_of(before[node])
