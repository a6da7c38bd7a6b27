"""fuse: zeros around an image become its convolution's padding; an addition and a relu behind, its epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .context import Context, is_ai3, only_user, replace, set_value

aten = torch.ops.aten
RELU = 1  # ai3_activation of kernel.h


def _residual(node: Node, user: Node) -> dict[str, Any] | None:
    """node + other, of the same shape and dtype."""
    if user.target is not aten.add.Tensor or user.kwargs:
        return None
    others = [arg for arg in user.args if arg is not node]
    other = others[0] if len(others) == 1 else None
    if not isinstance(other, Node) or node.kwargs.get("residual") is not None or node.kwargs.get("activation"):
        return None
    mine, theirs = node.meta["val"], other.meta["val"]
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype or mine.device != theirs.device:
        return None
    return {"residual": other}


def _relu(node: Node, user: Node) -> dict[str, Any] | None:
    if not (user.target is aten.relu.default or is_ai3(user, "ai3::relu")) or node.kwargs.get("activation"):
        return None
    return {"activation": RELU}


# What may follow an operation, by name in the report; each rule answers with the keyword arguments that stand for it.
EPILOGUES: dict[str, Callable[[Node, Node], dict[str, Any] | None]] = {"add": _residual, "relu": _relu}
PRODUCERS = ("ai3::conv2d", "ai3::linear")
# Where the paddings are among the arguments of ai3::conv2d.
PADDING = range(5, 9)


def run(graph: Graph, context: Context) -> None:
    if not (context.is_inference and context.policy.fuse):
        return
    for node in list(graph.nodes):
        producer: Node | None = node if is_ai3(node, *PRODUCERS) else None
        if is_ai3(node, "ai3::conv2d"):
            _absorb_padding(node, context)
        while producer is not None:
            producer = _absorb(producer, context)


def _absorb_padding(conv: Node, context: Context) -> None:
    """An even kernel with `padding="same"` comes as a padded copy of the image: ATen pads both sides alike."""
    pad = conv.args[0]
    while isinstance(pad, Node) and pad.target is aten.constant_pad_nd.default and only_user(pad) is conv:
        image, amounts, *value = pad.args
        if not isinstance(amounts, (list, tuple)) or len(amounts) != 4 or any(value):
            return
        if not all(isinstance(amount, int) and amount >= 0 for amount in amounts):
            return
        left, right, top, bottom = amounts
        args: list[Any] = [image, *conv.args[1:]]
        for position, amount in zip(PADDING, (top, bottom, left, right)):
            args[position] += amount
        conv.args = tuple(args)
        set_value(conv)
        context.report.fused(conv, pad, "pad")
        pad.graph.erase_node(pad)
        pad = image


def _absorb(producer: Node, context: Context) -> Node | None:
    """Takes the one user of an operation into it; None where it cannot."""
    user = only_user(producer)
    if user is None:
        return None
    for name, rule in EPILOGUES.items():
        # An operation whose algorithm the user named stays the operation the user asked for.
        if name == "relu" and (user in context.swapped or not context.policy.is_default("relu")):
            continue
        extra = rule(producer, user)
        if extra is None:
            continue
        with user.graph.inserting_before(user):
            kwargs = {**producer.kwargs, **extra}
            new = user.graph.call_function(producer.target, producer.args, kwargs)  # type: ignore[arg-type]
        new.meta = dict(producer.meta)
        context.report.rename(producer, new)
        context.report.fused(new, user, name)
        replace(user, new)
        producer.graph.erase_node(producer)
        return new
    return None
