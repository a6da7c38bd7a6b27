"""fuse: zeros around an image become its convolution's padding; an addition and an activation behind, its epilogue."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from ..ops.activations import NUMBERS
from .axes import VIEWS
from .context import Context, is_ai3, only_user, replace, set_value

aten = torch.ops.aten

Epilogue = dict[str, Any]


def _residual(producer: Node, seen: Node, user: Node) -> Epilogue | None:
    """seen + other, of the same shape and dtype."""
    if user.target is not aten.add.Tensor or user.kwargs:
        return None
    others = [arg for arg in user.args if arg is not seen]
    other = others[0] if len(others) == 1 else None
    if not isinstance(other, Node) or producer.kwargs.get("residual") is not None or producer.kwargs.get("activation"):
        return None
    mine, theirs = seen.meta["val"], other.meta["val"]
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype or mine.device != theirs.device:
        return None
    if seen is producer:
        return {"residual": other}
    sizes = _view_sizes(producer.meta["val"].shape)
    if sizes is None or not (mine.is_contiguous() and theirs.is_contiguous()):
        return None
    with user.graph.inserting_before(user):
        viewed = user.graph.call_function(aten.view.default, (other, sizes))
    set_value(viewed)
    return {"residual": viewed}


def _view_sizes(shape: torch.Size) -> list[int] | None:
    """The sizes to ask a view for; None where more than the first changes with the input."""
    first, *rest = shape
    if not all(isinstance(size, int) for size in rest) or 0 in rest:
        return None
    return [first if isinstance(first, int) else -1, *rest]


def _activation(name: str, matches: Callable[[Node], bool], producer: Node, seen: Node, user: Node) -> Epilogue | None:
    return {"activation": NUMBERS[name]} if matches(user) and not producer.kwargs.get("activation") else None


def _is_relu6(user: Node) -> bool:
    return user.target is aten.hardtanh.default and [*user.args[1:], *user.kwargs.values()] == [0, 6]


def _is_gelu(approximate: str, user: Node) -> bool:
    return user.target is aten.gelu.default and user.kwargs.get("approximate", "none") == approximate


MATCHES: dict[str, Callable[[Node], bool]] = {
    "relu": lambda user: user.target is aten.relu.default or is_ai3(user, "ai3::relu"),
    "relu6": _is_relu6,
    "hardswish": lambda user: user.target is aten.hardswish.default,
    "hardsigmoid": lambda user: user.target is aten.hardsigmoid.default,
    "sigmoid": lambda user: user.target is aten.sigmoid.default,
    "silu": lambda user: user.target is aten.silu.default,
    "gelu": functools.partial(_is_gelu, "none"),
    "gelu_tanh": functools.partial(_is_gelu, "tanh"),
}
# What may follow an operation, by name in the report. Each rule gets the operation, its value as it is seen behind
# views, and the user of that; it answers with the keyword arguments that stand for the user.
EPILOGUES: dict[str, Callable[[Node, Node, Node], Epilogue | None]] = {
    "add": _residual,
    **{name: functools.partial(_activation, name, matches) for name, matches in MATCHES.items()},
}
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
    """Takes into an operation the one user of its value, or of a view of it; None where it cannot."""
    views, user = behind(producer)
    if user is None:
        return None
    seen = views[-1] if views else producer
    for name, rule in EPILOGUES.items():
        # An operation whose algorithm the user named stays the operation the user asked for.
        if name == "relu" and (user in context.swapped or not context.policy.is_default("relu")):
            continue
        extra = rule(producer, seen, user)
        if extra is None:
            continue
        with user.graph.inserting_before(user):
            kwargs = {**producer.kwargs, **extra}
            new = user.graph.call_function(producer.target, producer.args, kwargs)  # type: ignore[arg-type]
        new.meta = dict(producer.meta)
        context.report.rename(producer, new)
        context.report.fused(new, user, name)
        for view in views:
            user.prepend(view)
        if views:
            producer.replace_all_uses_with(new)
        replace(user, views[-1] if views else new)
        producer.graph.erase_node(producer)
        return new
    return None


def behind(producer: Node) -> tuple[list[Node], Node | None]:
    """The views between an operation and what uses its value, each the only user of the one before, and that user."""
    views: list[Node] = []
    user = only_user(producer)
    while user is not None and user.target in VIEWS:
        views.append(user)
        user = only_user(user)
    return views, user
