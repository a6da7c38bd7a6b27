"""The graph passes over ATen graphs, in the order they run: bias, select, rows, copies, casts, fold, fuse,
prologue, decompose, layout, concat, pool, backward, plans, calls, sequence."""

from __future__ import annotations

from torch.fx import Graph

from . import (
    backward,
    bias,
    calls,
    casts,
    concat,
    copies,
    decompose,
    fold,
    fuse,
    layout,
    plans,
    pool,
    prologue,
    rows,
    select,
    sequence,
)
from .context import Context
from .left import left_to_torch

PASSES = (
    bias.run,
    select.run,
    rows.run,
    copies.run,
    casts.run,
    fold.run,
    fuse.run,
    prologue.run,
    decompose.run,
    layout.run,
    concat.run,
    pool.run,
    backward.run,
    plans.run,
    calls.run,
    sequence.run,
)


def run(graph: Graph, context: Context) -> None:
    """Runs every pass on a graph, in place; the graph is lint-free after each of them."""
    for step in PASSES:
        step(graph, context)


def run_backward(graph: Graph, context: Context) -> None:
    """The same for the backward of a graph, where only gradients have algorithms."""
    context.report.clear()  # it may be compiled again
    backward.run(graph, context)
    decompose.run(graph, context)


__all__ = ["PASSES", "Context", "left_to_torch", "run", "run_backward"]
