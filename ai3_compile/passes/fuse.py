"""fuse: a residual addition and a relu after a convolution or a linear become its epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .context import Context, is_ai3, only_user, replace

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


def run(graph: Graph, context: Context) -> None:
    if not (context.is_inference and context.policy.fuse):
        return
    for node in list(graph.nodes):
        producer: Node | None = node if is_ai3(node, *PRODUCERS) else None
        while producer is not None:
            producer = _absorb(producer, context)


def _absorb(producer: Node, context: Context) -> Node | None:
    """Takes the one user of an operation into it; None where it cannot."""
    user = only_user(producer)
    if user is None:
        return None
    for name, rule in EPILOGUES.items():
        # An operation whose algorithm the user named stays the operation the user asked for.
        if name == "relu" and not context.policy.is_default("relu"):
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
