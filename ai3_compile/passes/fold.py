"""fold: a batch norm in inference becomes part of the convolution before it.

(conv(x, w) + b - mean) * s + beta = conv(x, w * s) + (b - mean) * s + beta, with s = gamma / sqrt(var + eps).
The core library computes the new weight once a weight.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch.fx import Graph, Node

from .. import registry
from .context import Context, algorithm_of, is_ai3, is_made_a_half, only_user, replace
from .decompose import BATCH_NORM


def run(graph: Graph, context: Context) -> None:
    if not (context.is_inference and context.policy.fuse):
        return
    for norm in graph.find_nodes(op="call_function", target=BATCH_NORM):
        if _can_fold(norm, context):
            _fold(norm, context)
    graph.eliminate_dead_code()


def _can_fold(norm: Node, context: Context) -> bool:
    conv, weight, bias, mean, var = norm.args[:5]
    return (
        is_ai3(conv, "ai3::conv2d")
        and isinstance(conv, Node)
        and only_user(conv) is norm
        and not any(conv.kwargs.get(name) for name in ("residual", "activation", "bn_mean"))
        and [(user.target, user.args[1]) for user in norm.users] == [(operator.getitem, 0)]
        and _takes(conv, (weight, bias, mean, var), context)
    )


def _takes(conv: Node, parameters: Iterable[Any], context: Context) -> bool:
    """Whether the convolution can take in a batch norm of these: of its own type, or of one that is cast to it."""
    own, dtypes = conv.meta["val"].dtype, {t.meta["val"].dtype for t in parameters if t is not None}
    casts = registry.platforms()[context.algorithms[algorithm_of(conv)].platform].casts_parameters
    return all(dtype == own or (casts and is_made_a_half(dtype, own)) for dtype in dtypes)


def _fold(norm: Node, context: Context) -> None:
    conv, weight, bias, mean, var, _, eps = norm.args
    assert isinstance(conv, Node)
    kwargs = {**conv.kwargs, "bn_weight": weight, "bn_bias": bias, "bn_mean": mean, "bn_var": var, "bn_eps": eps}
    with norm.graph.inserting_before(norm):
        new = norm.graph.call_function(conv.target, conv.args, kwargs)  # type: ignore[arg-type]
    new.meta = dict(conv.meta)
    context.report.rename(conv, new)
    (output,) = norm.users
    replace(output, new)
    context.report.fused(new, norm, "batch_norm")
