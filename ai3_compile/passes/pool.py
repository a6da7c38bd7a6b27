"""pool: a max pooling of 2x2 pixels becomes part of the convolution that only it reads, where that is faster.

    max_pool2d(conv2d(x, w), 2, 2)  ->  conv2d_pooled(x, w)

No image of the convolution's own size is then written to memory and read again. Runs behind layout and concat: what
writes into a concatenation, or must convert its image, is left as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .. import registry
from ..ops import OPERATIONS
from ..ops.base import equal_paddings, shape_of
from ..ops.conv2d import POOLED
from .context import Context, algorithm_of, is_ai3, only_user, replace

# Of a convolution's keywords those that the pooled one has.
_KEPT = {"static_weight", "activation", "bn_weight", "bn_bias", "bn_mean", "bn_var", "bn_eps"}


def run(graph: Graph, context: Context) -> None:
    # An operation whose algorithm the user named stays the operation the user asked for.
    if not (context.is_inference and context.policy.fuse and context.policy.is_default("maxpool2d")):
        return
    for pool in list(graph.nodes):
        if not is_ai3(pool, "ai3::max_pool2d") or pool in context.swapped:
            continue
        conv = pool.args[0]
        assert isinstance(conv, Node)
        if is_ai3(conv, "ai3::conv2d") and _fits(conv, pool) and _gains(conv, context):
            _absorb(conv, pool, context)


def _fits(conv: Node, pool: Node) -> bool:
    assert isinstance(pool.target, torch._ops.OpOverload)
    if conv.target._overloadname != "default" or pool.target._overloadname != "default":  # type: ignore[union-attr]
        return False
    others = {name for name, value in conv.kwargs.items() if value is not None} - _KEPT - {"channels_last"}
    are_images = conv.meta["val"].dim() == 4 and conv.kwargs.get("channels_last") and pool.kwargs.get("channels_last")
    return bool(are_images) and not others and only_user(conv) is pool and pool.args[1:10] == POOLED


def _gains(conv: Node, context: Context) -> bool:
    image, weight, bias, stride_h, stride_w, *padding, dilation_h, dilation_w, groups, _ = conv.args
    assert isinstance(image, Node) and isinstance(weight, Node)
    attributes = {
        "stride": (stride_h, stride_w),
        "padding": equal_paddings(padding),  # type: ignore[arg-type]
        "dilation": (dilation_h, dilation_w),
        "groups": groups,
    }
    value = image.meta["val"]
    has_bias = bias is not None or conv.kwargs.get("bn_mean") is not None
    spec = OPERATIONS["conv2d"].spec(
        "", shape_of(image), shape_of(weight), has_bias, value.dtype, value.device.type, attributes
    )
    algorithm = context.algorithms[algorithm_of(conv)]
    activation: Any = conv.kwargs.get("activation", 0)
    return spec is not None and registry.platforms()[algorithm.platform].pools(algorithm, spec, activation)


def _absorb(conv: Node, pool: Node, context: Context) -> None:
    kwargs = {name: value for name, value in conv.kwargs.items() if name in _KEPT}
    with pool.graph.inserting_before(pool):
        new = pool.graph.call_function(torch.ops.ai3.conv2d_pooled.default, (*conv.args, algorithm_of(pool)), kwargs)
    context.report.rename(conv, new)
    context.report.fused(new, pool, "maxpool2d")
    replace(pool, new)
    conv.graph.erase_node(conv)
