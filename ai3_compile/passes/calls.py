"""calls: notes ai3's operations of a graph on a GPU, each to be run once before the graph is captured (on_gpu.py).

Runs before sequence joins them, and changes nothing.
"""

from __future__ import annotations

from torch.fx import Graph

from .. import on_gpu
from .context import Context


def run(graph: Graph, context: Context) -> None:
    if context.is_inference:
        context.report.calls = on_gpu.calls_of(graph, context.static_inputs)
