"""prologue: a batch norm in inference, and an activation behind it, become part of the 1x1 convolution that reads them.

    conv(relu((x - mean) * s + beta), w)  ->  conv(x, w, prologue_mean=mean, ..., prologue_activation=relu)

with s = gamma / sqrt(var + eps). The algorithm computes them on the pixels that it is about to multiply, so that no
image of them is written to memory and read again.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

from torch.fx import Graph, Node

from .. import registry
from ..ops.activations import NUMBERS
from .context import Context, algorithm_of, is_ai3, is_made_a_half, only_user, replace
from .decompose import BATCH_NORM
from .fuse import MATCHES, PADDING


def run(graph: Graph, context: Context) -> None:
    if not (context.is_inference and context.policy.fuse):
        return
    for conv in list(graph.nodes):
        if is_ai3(conv, "ai3::conv2d") and _takes_prologue(conv):
            _absorb(conv, context)
    graph.eliminate_dead_code()


def _takes_prologue(conv: Node) -> bool:
    input, weight = conv.args[:2]
    assert isinstance(input, Node) and isinstance(weight, Node)
    return (
        input.meta["val"].dim() == 4
        and tuple(weight.meta["val"].shape[2:]) == (1, 1)
        and not any(conv.args[position] for position in PADDING)
        and conv.kwargs.get("residual") is not input
    )


class Prologue(NamedTuple):
    norm: Node
    output: Node
    """The norm's first result."""
    source: Node
    """What the convolution reads: the output behind its activation, or itself."""
    activation: str


def prologue_of(conv: Node) -> Prologue | None:
    """The batch norm, with the activation behind it, that nothing but a convolution reads, and nothing between."""
    source = conv.args[0]
    assert isinstance(source, Node)
    name = next((name for name, matches in MATCHES.items() if matches(source)), "identity")
    output = source if name == "identity" else source.args[0]
    if only_user(source) is not conv or (output is not source and only_user(output) is not source):  # type: ignore[arg-type]
        return None
    norm = output.args[0] if isinstance(output, Node) and output.target is operator.getitem else None
    if not (isinstance(norm, Node) and norm.target is BATCH_NORM and only_user(norm) is output):
        return None
    assert isinstance(output, Node)
    image, *parameters = (t.meta["val"] for t in norm.args[:5] if t is not None)  # type: ignore[union-attr]
    own, dtypes = conv.meta["val"].dtype, {t.dtype for t in parameters}
    if image.dtype != own or not all(
        dtype == own or (image.is_cuda and is_made_a_half(dtype, own)) for dtype in dtypes
    ):
        return None
    return Prologue(norm, output, source, name)


def _absorb(conv: Node, context: Context) -> None:
    found = prologue_of(conv)
    if found is None:
        return
    norm, _, source, name = found
    # An operation whose algorithm the user named stays the operation the user asked for.
    if name == "relu" and (source in context.swapped or not context.policy.is_default("relu")):
        return
    algorithm = context.algorithms[algorithm_of(conv)]
    if not registry.platforms()[algorithm.platform].applies_prologues(algorithm, NUMBERS[name]):
        return
    image, weight, bias, mean, var, _, eps = norm.args
    prologue = {"weight": weight, "bias": bias, "mean": mean, "var": var, "eps": eps, "activation": NUMBERS[name]}
    kwargs = {**conv.kwargs, **{f"prologue_{key}": value for key, value in prologue.items()}}
    with conv.graph.inserting_before(conv):
        new = conv.graph.call_function(conv.target, (image, *conv.args[1:]), kwargs)  # type: ignore[arg-type]
    context.report.rename(conv, new)
    if name != "identity":
        context.report.fused(new, source, name, before=True)
    context.report.fused(new, norm, "batch_norm", before=True)
    replace(conv, new)
