"""fold: a batch norm in inference becomes part of the convolution before it.

(conv(x, w) + b - mean) * s + beta = conv(x, w * s) + (b - mean) * s + beta, with s = gamma / sqrt(var + eps).
The core library computes the new weight once a weight.
"""

from __future__ import annotations

import operator

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from .context import Context, is_ai3, only_user, replace, value_of

aten = torch.ops.aten
BATCH_NORM = aten._native_batch_norm_legit_no_training.default


def run(graph: Graph, context: Context) -> None:
    for norm in graph.find_nodes(op="call_function", target=BATCH_NORM):
        if context.is_inference and context.policy.fuse and _can_fold(norm):
            _fold(norm, context)
        elif context.decompose_batch_norm:
            _decompose(norm)
    graph.eliminate_dead_code()


def decompose_all(graph: Graph) -> None:
    """For graphs that ai3 leaves alone: Inductor has no rule for the batch norms that this pass wants to see whole."""
    for norm in graph.find_nodes(op="call_function", target=BATCH_NORM):
        _decompose(norm)


def _can_fold(norm: Node) -> bool:
    conv, weight, bias, mean, var = norm.args[:5]
    return (
        is_ai3(conv, "ai3::conv2d")
        and isinstance(conv, Node)
        and only_user(conv) is norm
        and not any(conv.kwargs.get(name) for name in ("residual", "activation", "bn_mean"))
        and [(user.target, user.args[1]) for user in norm.users] == [(operator.getitem, 0)]
        and all(t is None or t.meta["val"].dtype == conv.meta["val"].dtype for t in (weight, bias, mean, var))  # type: ignore[union-attr]
    )


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


def _decompose(norm: Node) -> None:
    """Writes a batch norm as the primitive operations that Inductor would have made of it."""
    traced = make_fx(BATCH_NORM, decomposition_table=select_decomp_table())(*value_of(norm.args))
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    arguments = dict(zip(inputs, norm.args))
    with norm.graph.inserting_before(norm):
        outputs = norm.graph.graph_copy(traced.graph, arguments)
    assert isinstance(outputs, (tuple, list))
    for user in list(norm.users):
        user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
        norm.graph.erase_node(user)
    norm.graph.erase_node(norm)
