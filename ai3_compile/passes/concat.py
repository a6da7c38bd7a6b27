"""concat: the operations whose results are concatenated along the channels write them where they belong.

    cat([conv(x), pool(x), y], 1)  ->  image = empty(...); conv_into(image, 0, x); pool_into(image, c, x)
                                       image[:, d:].copy_(y)

in channels_last, where the channels of a pixel lie together. Runs behind layout, which makes the images so.

Concatenations that grow, as in DenseNet, are one image: each is the first channels of what the last of them needs, and
the convolutions that read it step over the channels that are still to come.

    conv(cat([x, y], 1)) = z; cat([x, y, z], 1)  ->  conv_into(image, d, image[:, :d])
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .. import registry
from ..ops import OPERATIONS
from .context import Context, algorithm_of, is_ai3, set_value

aten = torch.ops.aten
_INTO = {operation.op_name: operation.into_name for operation in OPERATIONS.values() if operation.into_name}


class Piece(NamedTuple):
    """One of the values that are concatenated."""

    node: Node
    begin: int
    """The first of its channels."""

    @property
    def channels(self) -> int:
        return int(self.node.meta["val"].shape[1])

    @property
    def end(self) -> int:
        return self.begin + self.channels


# A concatenation that becomes a part of a larger one: its pieces, numbered as those of the larger one.
Parts = dict[Node, range]


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
        pieces, parts = _group(cat, graph, context)
        if not _are_slices(pieces, cat.meta["val"]):
            continue
        producers = {piece.node for piece in pieces if _can_write(piece, pieces, parts, context)}
        # Where most is copied anyway, a concatenation that Inductor fuses with what follows is the better copy.
        copied = sum(piece.channels for piece in pieces if piece.node not in producers)
        if 2 * copied > sum(part.meta["val"].shape[1] for part in parts):
            continue
        # What is copied must be there before the first concatenation that has it is read.
        order = {node: index for index, node in enumerate(graph.nodes)}
        users = {p: min((c for c in parts if i in parts[c]), key=order.__getitem__) for i, p in enumerate(pieces)}
        places = {piece: piece.node if piece.node in producers else users[piece] for piece in pieces}
        first = min(pieces, key=lambda piece: order[places[piece]])
        image = _empty_image(cat, first.node.args[0] if first.node in producers else first.node, places[first])
        if image is not None:
            seen.update(parts)
            _write(pieces, places, parts, image, cat, context)


def _group(cat: Node, graph: Graph, context: Context) -> tuple[list[Piece], Parts]:
    """What is concatenated along the channels, with inner concatenations taken apart, and the concatenations that are
    parts of it, itself among them: whatever else reads one of those can read some channels of an image.

    Without pieces for another dimension.
    """
    group = {node for node in graph.find_nodes(op="call_function", target=aten.cat.default) if _joins_channels(node)}
    while cat in group:
        leaves = _leaves(cat, group)
        places = {node: _place(_leaves(node, group), leaves) for node in group}
        kept = {
            node
            for node in group
            if node is cat
            or (places[node] and all(user in group or _reads_slices(user, node, context) for user in node.users))
        }
        if kept == group:
            ends = [0, *itertools.accumulate(int(leaf.meta["val"].shape[1]) for leaf in leaves)]
            return [Piece(leaf, begin) for leaf, begin in zip(leaves, ends)], places
        group = kept
    return [], {}


def _joins_channels(cat: Node) -> bool:
    _, dim = (*cat.args, 0)[:2]
    value = cat.meta["val"]
    return not cat.kwargs and value.dim() == 4 and dim in (1, -3) and isinstance(value.shape[1], int)


def _leaves(cat: Node, group: set[Node]) -> list[Node]:
    tensors = cat.args[0]
    assert isinstance(tensors, Sequence)
    leaves: list[Node] = []
    for node in tensors:
        assert isinstance(node, Node)
        leaves.extend(_leaves(node, group) if node in group and list(tensors).count(node) == 1 else [node])
    return leaves


def _place(some: list[Node], leaves: list[Node]) -> range:
    """Where some stand among the leaves, one after another; empty where they do not."""
    starts = (i for i, leaf in enumerate(leaves) if leaf is some[0] and leaves[i : i + len(some)] == some)
    start = next(starts, None)
    return range(0) if start is None else range(start, start + len(some))


def _reads_slices(user: Node, value: Node, context: Context) -> bool:
    """Whether an operation reads the value as its image, and can where that is some channels of a larger one."""
    if not is_ai3(user, "ai3::conv2d") or [arg for arg in user.all_input_nodes if arg is value] != [value]:
        return False
    algorithm = context.algorithms[algorithm_of(user)]
    return (
        user.args[0] is value
        and user.kwargs.get("residual") is not value
        and bool(user.kwargs.get("channels_last"))
        and registry.platforms()[algorithm.platform].reads_slices(algorithm)
    )


def _are_slices(pieces: Sequence[Piece], whole: torch.Tensor) -> bool:
    """Whether the values are, as they are, the channels of a channels_last image."""
    if not pieces or not whole.is_contiguous(memory_format=torch.channels_last):
        return False
    values = [piece.node.meta["val"] for piece in pieces]
    return all(v.dim() == 4 and isinstance(v.shape[1], int) and v.dtype == whole.dtype for v in values)


def _can_write(piece: Piece, pieces: Sequence[Piece], parts: Parts, context: Context) -> bool:
    """Whether an algorithm that can write into this place computes the value, and all who use it find it there."""
    node = piece.node
    if not is_ai3(node, *_INTO):
        return False
    if not all(user in parts or _reads_slices(user, node, context) for user in node.users):
        return False
    if [p.node for p in pieces].count(node) > 1:
        return False
    algorithm = context.algorithms[algorithm_of(node)]
    return (
        registry.platforms()[algorithm.platform].writes_slices(algorithm)
        and bool(node.kwargs.get("channels_last"))
        and all(node.kwargs.get(name) is None for name in ("residual", "prologue_mean"))
    )


def _empty_image(cat: Node, source: Any, place: Node) -> Node | None:
    """The concatenation's memory, made at `place`; None for sizes that `source` does not tell there."""
    graph, value = cat.graph, cat.meta["val"]
    assert isinstance(source, Node)
    # A size that changes with the input is read from the source's, unless a window makes another one of it.
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

    with graph.inserting_before(place):
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


def _write(
    pieces: Sequence[Piece], places: dict[Piece, Node], parts: Parts, image: Node, cat: Node, context: Context
) -> None:
    """Has every piece written into the image, and puts that, or some of its channels, in the place of every part."""
    graph = cat.graph

    def channels(begin: int, end: int) -> Node:
        part = graph.call_function(aten.slice.Tensor, (image, 1, begin, end))
        part.meta = dict(cat.meta)
        set_value(part)
        return part

    def read_from_image(value: Node, begin: int, end: int, place: Node) -> None:
        if all(user in parts for user in value.users):
            return
        with graph.inserting_after(place):
            view = channels(begin, end)
        for user in value.replace_all_uses_with(view, delete_user_cb=lambda user: user not in parts):
            set_value(user)

    for piece in pieces:
        node = piece.node
        if node is not places[piece]:
            with graph.inserting_before(places[piece]):
                copy = graph.call_function(aten.copy_.default, (channels(piece.begin, piece.end), node))
            copy.meta = dict(cat.meta)
            set_value(copy)
            continue
        operation = _operation(node)
        # Not its layout, which is channels_last, nor what _can_write excludes.
        kwargs = {a.name: node.kwargs[a.name] for a in operation._schema.arguments if a.name in node.kwargs}
        with graph.inserting_before(node):
            into = graph.call_function(operation, (image, piece.begin, *node.args), kwargs)
        into.meta = dict(node.meta)
        set_value(into)
        context.report.rename(node, into)
        context.report.fused(into, cat, "concat")
        read_from_image(node, piece.begin, piece.end, into)
    for part, within in parts.items():
        if part is not cat:
            read_from_image(part, pieces[within.start].begin, pieces[within.stop - 1].end, part)
    cat.replace_all_uses_with(image)
    graph.eliminate_dead_code()  # the producers and the other parts: nothing uses them now


def _operation(node: Node) -> torch._ops.OpOverload:
    assert isinstance(node.target, torch._ops.OpOverload)
    name = _INTO[node.target._schema.name]
    assert name is not None
    return getattr(torch.ops.ai3, name.removeprefix("ai3::")).default
