"""The graph passes over ATen graphs, in the order they run: select, fold, fuse, prologue, decompose, copies, layout,
concat, sequence."""

from __future__ import annotations

from torch.fx import Graph

from . import concat, copies, decompose, fold, fuse, layout, prologue, select, sequence
from .context import Context
from .left import left_to_torch

PASSES = (
    select.run,
    fold.run,
    fuse.run,
    prologue.run,
    decompose.run,
    copies.run,
    layout.run,
    concat.run,
    sequence.run,
)


def run(graph: Graph, context: Context) -> None:
    """Runs every pass on a graph, in place; the graph is lint-free after each of them."""
    for step in PASSES:
        step(graph, context)


__all__ = ["PASSES", "Context", "left_to_torch", "run"]
