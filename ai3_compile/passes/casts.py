"""casts: a parameter that autocast makes a half at each call is made one once, by the core library, with its pack.

    y = conv(x, convert(w, float16), convert(b, float16))  ->  y = conv(x, w, b)

The core library keeps what it makes of a parameter while the parameter stays as it is.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import registry
from .context import Context, algorithm_of, is_ai3, is_made_a_half, static_nodes

_CONVERT, _TO_COPY = torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default
_WEIGHT, _BIAS = 1, 2  # among the arguments of both operations


def run(graph: Graph, context: Context) -> None:
    if not context.is_inference:
        return
    static = static_nodes(graph, context)
    for node in graph.nodes:
        if not is_ai3(node, "ai3::conv2d", "ai3::linear"):
            continue
        if not registry.platforms()[context.algorithms[algorithm_of(node)].platform].casts_parameters:
            continue
        for position in (_WEIGHT, _BIAS):
            source = _source(node.args[position], static)
            if source is not None:
                node.update_arg(position, source)
                if position == _WEIGHT:
                    node.update_kwarg("static_weight", True)
    graph.eliminate_dead_code()


def _source(node: Any, static: Container[Node]) -> Node | None:
    """The parameter of float32 that a node casts to a half, and does nothing else."""
    if not isinstance(node, Node) or node.target not in (_CONVERT, _TO_COPY) or not set(node.kwargs) <= {"dtype"}:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    is_cast = is_made_a_half(source.meta["val"].dtype, node.meta["val"].dtype)
    return source if is_cast and source in static else None
