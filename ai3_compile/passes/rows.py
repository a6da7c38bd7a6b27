"""rows: a linear takes rows in the order in which they lie, and attention its matrices where they lie.

permute -> clone -> view -> linear -> view                  =>   view -> linear -> view -> permute
linear -> view -> permute -> clone -> select -> attention   =>   linear -> view -> select -> permute -> attention

So nn.MultiheadAttention, which puts tokens before images and copies queries, keys and values to have them apart, copies
nothing. What follows has the strides that come of it, up to what asks for others.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..ops import attention_graph
from . import axes
from .axes import Axis, Dims
from .context import Context, is_ai3, restored, set_value, strides_of

aten = torch.ops.aten
_PERMUTES = (aten.permute.default, aten.transpose.int)


def run(graph: Graph, context: Context) -> None:
    if not (context.is_inference and context.policy.fuse and _is_plain(graph)):
        return
    before: dict[Node, Any] = {}
    """What had other strides before, and its value then."""
    gone: set[Node] = set()
    for node in list(graph.nodes):
        if node in gone:
            continue
        _follow(node, before)
        if (position := _rows_of(node)) is not None:
            gone |= _in_order(node, position, before)
        elif is_ai3(node, "ai3::attention") or node.target in attention_graph.FUSED:
            _where_they_lie(node, before)
        elif node.target in _PERMUTES:
            _back_in_order(node, before)
    graph.eliminate_dead_code(attention_graph.is_impure)


def _is_plain(graph: Graph) -> bool:
    """Whether the strides of all results can be had by a copy."""
    results = [node.meta.get("val") for node in graph.output_node().all_input_nodes]
    return all(_is_dense(value) for value in results if isinstance(value, torch.Tensor))


def _is_dense(value: torch.Tensor) -> bool:
    if not all(isinstance(size, int) for size in (*value.shape, *value.stride())):
        return False
    step = 1
    for stride, size in sorted(zip(value.stride(), value.shape)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _rows_of(node: Node) -> int | None:
    """Where the rows are among the arguments of a linear; None for what is none."""
    if is_ai3(node, "ai3::linear"):
        return 0 if node.kwargs.get("residual") is None and _rank(node.args[0]) == 2 else None
    if node.target is aten.mm.default:
        return 0
    return 1 if node.target is aten.addmm.default and not node.kwargs and _rank(node.args[0]) == 1 else None


def _rank(node: Any) -> int:
    return int(node.meta["val"].dim())


def _in_order(linear: Node, position: int, before: dict[Node, Any]) -> set[Node]:
    """Gives a linear its rows as they lie, and what views the result the order that they had; the views it replaced."""
    given = linear.args[position]
    assert isinstance(given, Node)
    path = axes.path_to(given)
    if path is None or not path.copies or path.chosen:
        return set()
    rows, columns = path.dims
    as_they_lie = sorted(rows, key=lambda axis: -axis.stride)
    together: Dims = [[*as_they_lie, *columns]]
    if not columns or columns[-1].stride != 1 or not axes.is_view(together):
        return set()
    results = list(linear.users)
    width = linear.meta["val"].shape[1]
    after = _lying(as_they_lie, width)
    shapes = [_leading(user, [after[axis] for axis in rows], width) for user in results]
    if as_they_lie != list(rows) and not all(s is not None and _is_absorbed(u, s) for u, s in zip(results, shapes)):
        return set()
    with linear.graph.inserting_before(linear):
        taken = axes.emit(path, [as_they_lie, columns])
    linear.update_arg(position, taken)
    if as_they_lie == list(rows):
        return set()
    for user, dims in zip(results, shapes):
        assert dims is not None
        with linear.graph.inserting_before(user):
            found = axes.emit(axes.Path(linear, dims), dims)
        before[found] = user.meta["val"]
        found.meta = {**user.meta, "val": found.meta["val"]}
        user.replace_all_uses_with(found)
        linear.graph.erase_node(user)
    return set(results)


def _lying(order: list[Axis], width: int) -> dict[Axis, Axis]:
    """The axes of rows as those of a result whose rows have this order."""
    found, step = {}, width
    for axis in reversed(order):
        found[axis] = Axis(axis.size, step, step)
        step *= axis.size
    return found


def _leading(user: Node, rows: list[Axis], width: int) -> Dims | None:
    """The dimensions of a view of the result, of rows in the order that they had; None for what is no such view."""
    if user.target not in axes.VIEWS or width == 1:
        return None
    shape = user.meta["val"].shape
    if shape[-1] != width:
        return None
    dims = axes.regrouped([rows, [Axis(width, 1, 1)]], shape)
    return dims if dims is not None and axes.is_view(dims) else None


def _is_absorbed(node: Node, dims: Dims) -> bool:
    """Whether what reads it needs no copy that it did not need: elementwise operations, attention, copies."""
    for user in node.users:
        target = user.target
        if target in axes.COPIES or is_ai3(user, "ai3::attention") or target in attention_graph.FUSED:
            continue
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
            continue
        behind = axes.after(user, dims, [])
        if behind is None or not axes.is_view(behind) or not _is_absorbed(user, behind):
            return False
    return True


def _back_in_order(node: Node, before: dict[Node, Any]) -> None:
    """Permutations that undo each other are none."""
    path = axes.path_to(node)
    if path is None or path.copies or path.chosen or path.source is node.args[0]:
        return
    kept = [axis for dim in path.dims for axis in dim]
    if axes.is_view([kept]) and [axis.place for axis in kept] == [axis.stride for axis in kept]:
        with node.graph.inserting_before(node):
            found = axes.emit(path, path.dims)
        node.replace_all_uses_with(found)
        if node in before:
            before[found] = before[node]


def _where_they_lie(attention: Node, before: dict[Node, Any]) -> None:
    had = attention.meta["val"]
    for position in range(3):
        given = attention.args[position]
        path = axes.path_to(given) if isinstance(given, Node) else None
        if path is None or not path.copies or not path.dims[-1] or path.dims[-1][-1].stride != 1:
            continue
        if axes.is_view(path.dims):
            with attention.graph.inserting_before(attention):
                attention.update_arg(position, axes.emit(path, path.dims))
    _set_value(attention, had, before)


def _follow(node: Node, before: dict[Node, Any]) -> None:
    """Computes the strides of a node that reads what has others than before, or restores those where it needs them."""
    changed = [source for source in node.all_input_nodes if source in before]
    if changed and _is_known(node):
        if node.target in axes.VIEWS:
            node.target = aten.reshape.default  # it may need a copy now
        _set_value(node, node.meta["val"], before)
        return
    for source in changed:
        node.replace_input_with(source, restored(source, before[source], node, _copy_of))


def _set_value(node: Node, had: Any, before: dict[Node, Any]) -> None:
    set_value(node)
    if strides_of(node.meta["val"]) != strides_of(had):
        before.setdefault(node, had)


def _is_known(node: Node) -> bool:
    """Whether an operation computes the same from an argument of other strides."""
    target = node.target
    if target is operator.getitem or target in axes.VIEWS:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return target.namespace in ("aten", "prims", "ai3") and (not target.is_view or target in axes.STEPS)


def _copy_of(source: Node, memory_format: torch.memory_format, user: Node) -> Node:
    with user.graph.inserting_before(user):
        copy = user.graph.call_function(aten.clone.default, (source,), {"memory_format": memory_format})
    set_value(copy)
    return copy
