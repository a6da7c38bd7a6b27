"""Where the elements of a tensor lie that comes of another by views and copies: its dimensions as axes of that one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from .context import set_value

aten = torch.ops.aten

# They change the shape alone: what is elementwise may as well come before them.
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
COPIES = (aten.clone.default, aten.contiguous.default)


class Axis(NamedTuple):
    size: int
    place: int
    """Elements from one index to the next in the source, read in its order."""
    stride: int
    """The same in memory."""


Dims = Sequence[Sequence[Axis]]


@dataclass
class Path:
    """From a source to a node: the axes of each of its dimensions, none in one of a single element."""

    source: Node
    dims: Dims
    chosen: list[tuple[Axis, int]] = field(default_factory=list)
    """Axes that `select` has left out, with the index."""
    copies: bool = False


def path_to(node: Node) -> Path | None:
    """The path from what is computed, of known sizes, through views and copies; None where one of them is another's."""
    steps: list[Node] = []
    source = node
    while source.target in STEPS and isinstance(source.args[0], Node):
        steps.append(source)
        source = source.args[0]
    value = source.meta.get("val")
    if not isinstance(value, torch.Tensor) or 0 in value.shape:
        return None
    if not all(isinstance(size, int) for size in (*value.shape, *value.stride())):
        return None
    places = [math.prod(value.shape[d + 1 :]) for d in range(value.dim())]
    axes = zip(value.shape, places, value.stride())
    path = Path(source, [[Axis(*axis)] if axis[0] != 1 else [] for axis in axes])
    for step in reversed(steps):
        dims = after(step, path.dims, path.chosen)
        if dims is None:
            return None
        path.dims = dims
        path.copies = path.copies or step.target in COPIES
    return path


def after(step: Node, dims: Dims, chosen: list[tuple[Axis, int]]) -> Dims | None:
    """The dimensions behind a view or a copy, or None where it is not one of those known here."""
    rule = STEPS.get(step.target)
    return None if rule is None else rule(step, dims, chosen)


def regrouped(dims: Dims, shape: Sequence[Any]) -> Dims | None:
    """The same elements in the same order, in a tensor of another shape."""
    rest, found = [axis for dim in dims for axis in dim], []
    for size in shape:
        if not isinstance(size, int):
            return None
        group: list[Axis] = []
        while size > 1:
            if not rest:
                return None
            axis = rest.pop(0)
            if size % axis.size != 0:
                if axis.size % size != 0:
                    return None
                inner = axis.size // size
                rest.insert(0, Axis(inner, axis.place, axis.stride))
                axis = Axis(size, axis.place * inner, axis.stride * inner)
            group.append(axis)
            size //= axis.size
        found.append(group)
    return None if rest else found


def is_view(dims: Dims) -> bool:
    """Whether a tensor can have these dimensions without a copy: each has one stride."""
    return all(a.stride == b.stride * b.size for dim in dims for a, b in zip(dim, dim[1:]))


def emit(path: Path, dims: Dims) -> Node:
    """The tensor of these dimensions, of the axes of the path, as views of its source; where the graph inserts."""
    graph, node = path.source.graph, path.source

    def call(target: Any, *args: Any) -> None:
        nonlocal node
        node = graph.call_function(target, (node, *args))
        set_value(node)

    kept = [axis for dim in dims for axis in dim]
    axes = sorted((*kept, *(axis for axis, _ in path.chosen)), key=lambda axis: -axis.place)
    if [axis.size for axis in axes] != list(node.meta["val"].shape):
        call(aten.reshape.default, [axis.size for axis in axes])
    for axis, index in path.chosen:
        call(aten.select.int, axes.index(axis), index)
        axes.remove(axis)
    order = [axes.index(axis) for axis in kept]
    if order != sorted(order):
        call(aten.permute.default, order)
    shape = [math.prod(axis.size for axis in dim) for dim in dims]
    if shape != list(node.meta["val"].shape):
        call(aten.reshape.default, shape)
    return node


def _as_it_is(step: Node, dims: Dims, chosen: Any) -> Dims:
    return dims


def _viewed(step: Node, dims: Dims, chosen: Any) -> Dims | None:
    return regrouped(dims, step.meta["val"].shape)


def _permuted(step: Node, dims: Dims, chosen: Any) -> Dims:
    return [dims[d] for d in _arguments(step)[0]]


def _transposed(step: Node, dims: Dims, chosen: Any) -> Dims:
    found = list(dims)
    first, second = (d % len(found) for d in _arguments(step))
    found[first], found[second] = found[second], found[first]
    return found


def _turned(step: Node, dims: Dims, chosen: Any) -> Dims:
    return [*reversed(dims)]


def _unsqueezed(step: Node, dims: Dims, chosen: Any) -> Dims:
    at = _arguments(step)[0] % (len(dims) + 1)
    return [*dims[:at], [], *dims[at:]]


def _squeezed(step: Node, dims: Dims, chosen: Any) -> Dims:
    at = _arguments(step)[0] % len(dims)
    return dims if dims[at] else [*dims[:at], *dims[at + 1 :]]


def _selected(step: Node, dims: Dims, chosen: list[tuple[Axis, int]]) -> Dims | None:
    at, index = _arguments(step)
    if not isinstance(index, int) or len(dims[at]) > 1:
        return None
    chosen.extend((axis, index % axis.size) for axis in dims[at])
    return [*dims[: at % len(dims)], *dims[at % len(dims) + 1 :]]


def _arguments(step: Node) -> tuple[Any, ...]:
    return step.args[1:]


STEPS: dict[Any, Callable[[Node, Dims, list[tuple[Axis, int]]], Dims | None]] = {
    **dict.fromkeys(VIEWS, _viewed),
    **dict.fromkeys((*COPIES, aten.alias.default), _as_it_is),
    aten.permute.default: _permuted,
    aten.transpose.int: _transposed,
    aten.t.default: _turned,
    aten.unsqueeze.default: _unsqueezed,
    aten.squeeze.dim: _squeezed,
    aten.select.int: _selected,
}
