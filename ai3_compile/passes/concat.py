"""concat: the operations whose results are concatenated along the channels write them where they belong.

    cat([conv(x), pool(x), y], 1)  ->  image = empty(...); conv_into(image, 0, x); pool_into(image, c, x)
                                       image[:, d:].copy_(y)

in channels_last, where the channels of a pixel lie together. Runs behind layout, which makes the images so.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .. import registry
from ..ops import OPERATIONS
from .context import Context, algorithm_of, is_ai3, only_user, set_value

aten = torch.ops.aten
_INTO = {operation.op_name: operation.into_name for operation in OPERATIONS.values() if operation.into_name}
# The arguments that the operations of _INTO lack: their image is channels_last, and without a residual.
_DROPPED = ("channels_last", "residual")


class Piece(NamedTuple):
    """One of the values that are concatenated."""

    node: Node
    cat: Node
    """The concatenation that it is an argument of: an inner one where they are nested."""

    @property
    def channels(self) -> int:
        return int(self.node.meta["val"].shape[1])


def run(graph: Graph, context: Context) -> None:
    if not (context.is_inference and context.policy.fuse):
        return
    seen: set[Node] = set()

    def outermost() -> Node | None:
        """The last concatenation that is left: an inner one can become part of its only user."""
        left = (cat for cat in graph.find_nodes(op="call_function", target=aten.cat.default) if cat not in seen)
        return next(reversed(list(left)), None)

    while (cat := outermost()) is not None:
        seen.add(cat)
        pieces = _pieces(cat)
        if not _are_slices(pieces, cat.meta["val"]):
            continue
        producers = {piece.node for piece in pieces if _can_write(piece, pieces, context)}
        # Where most is copied anyway, a concatenation that Inductor fuses with what follows is the better copy.
        written = sum(piece.channels for piece in pieces if piece.node in producers)
        if not producers or 2 * written < sum(piece.channels for piece in pieces):
            continue
        first = next(node for node in graph.nodes if node in producers)
        image = _empty_image(cat, first)
        if image is not None:
            _write(pieces, producers, image, cat, context)


def _pieces(cat: Node) -> list[Piece]:
    """What is concatenated along the channels, with inner concatenations taken apart; empty for another dimension."""
    tensors, dim = (*cat.args, 0)[:2]
    if cat.kwargs or cat.meta["val"].dim() != 4 or dim not in (1, -3):
        return []
    assert isinstance(tensors, Sequence)
    pieces: list[Piece] = []
    for node in tensors:
        assert isinstance(node, Node)
        inner = node.target is aten.cat.default and only_user(node) is cat and list(tensors).count(node) == 1
        pieces.extend((inner and _pieces(node)) or [Piece(node, cat)])
    return pieces


def _are_slices(pieces: Sequence[Piece], whole: torch.Tensor) -> bool:
    """Whether the values are, as they are, the channels of a channels_last image."""
    if not pieces or not whole.is_contiguous(memory_format=torch.channels_last):
        return False
    values = [piece.node.meta["val"] for piece in pieces]
    return all(v.dim() == 4 and isinstance(v.shape[1], int) and v.dtype == whole.dtype for v in values)


def _can_write(piece: Piece, pieces: Sequence[Piece], context: Context) -> bool:
    """Whether a value is computed for this place alone, by an algorithm that can write into it."""
    node = piece.node
    if not is_ai3(node, *_INTO) or only_user(node) is not piece.cat or [p.node for p in pieces].count(node) > 1:
        return False
    algorithm = context.algorithms[algorithm_of(node)]
    return (
        registry.platforms()[algorithm.platform].writes_slices(algorithm)
        and bool(node.kwargs.get("channels_last"))
        and node.kwargs.get("residual") is None
    )


def _empty_image(cat: Node, first: Node) -> Node | None:
    """The concatenation's memory, made before its first producer; None for sizes that cannot be told there."""
    graph, value, source = cat.graph, cat.meta["val"], first.args[0]
    assert isinstance(source, Node)
    # A size that changes with the input is read from the producer's, unless its window makes another one of it.
    expressions = [size.node.expr if isinstance(size, torch.SymInt) else None for size in source.meta["val"].shape]
    changing = {dim: size.node.expr for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
    if any(expression not in expressions for expression in changing.values()):
        return None

    def call(target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        set_value(node)
        return node

    def product(a: Any, b: Any) -> Any:
        return call(operator.mul, a, b) if isinstance(a, Node) or isinstance(b, Node) else a * b

    with graph.inserting_before(first):
        sizes: list[Any] = list(value.shape)
        for dim, expression in changing.items():
            sizes[dim] = call(aten.sym_size.int, source, expressions.index(expression))
        strides: list[Any] = list(value.stride())
        if any(isinstance(stride, torch.SymInt) for stride in strides):
            row = product(sizes[3], sizes[1])
            strides = [product(sizes[2], row), 1, row, sizes[1]]
        like = {"dtype": value.dtype, "device": value.device}
        image = graph.call_function(aten.empty_strided.default, (sizes, strides), like)
    image.meta = dict(cat.meta)
    return image


def _write(pieces: Sequence[Piece], producers: set[Node], image: Node, cat: Node, context: Context) -> None:
    """Has every piece written into the image, and puts that in the place of the concatenation."""
    graph, channel = cat.graph, 0
    for piece in pieces:
        begin, channel = channel, channel + piece.channels
        node = piece.node
        if node not in producers:
            with graph.inserting_before(cat):
                part = graph.call_function(aten.slice.Tensor, (image, 1, begin, channel))
                copy = graph.call_function(aten.copy_.default, (part, node))
            for new in (part, copy):
                new.meta = dict(cat.meta)
                set_value(new)
            continue
        kwargs = {name: value for name, value in node.kwargs.items() if name not in _DROPPED}
        with graph.inserting_before(node):
            into = graph.call_function(_operation(node), (image, begin, *node.args), kwargs)
        into.meta = dict(node.meta)
        set_value(into)
        context.report.rename(node, into)
        context.report.fused(into, cat, "concat")
    cat.replace_all_uses_with(image)
    graph.eliminate_dead_code()  # the producers and, with inner ones, the concatenation: nothing uses them now


def _operation(node: Node) -> torch._ops.OpOverload:
    assert isinstance(node.target, torch._ops.OpOverload)
    name = _INTO[node.target._schema.name]
    assert name is not None
    return getattr(torch.ops.ai3, name.removeprefix("ai3::")).default
