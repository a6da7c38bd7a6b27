"""plans: finds the fastest of cuDNN's plans for what its `auto` is to run, with all that is fused into it."""

from __future__ import annotations

from torch.fx import Graph, Node

from .. import on_gpu, registry
from .context import Context, algorithm_of, is_ai3

NAMES = ("ai3::conv2d", "ai3::conv2d_into")


def run(graph: Graph, context: Context) -> None:
    nodes = [node for node in graph.nodes if is_ai3(node, *NAMES) and _is_searched(node, context)]
    if nodes:
        from ..backends import cudnn

        calls = [on_gpu.call_of(node, {}) for node in nodes]
        cudnn.search(calls, context.policy.max_workspace)


def _is_searched(node: Node, context: Context) -> bool:
    algorithm = context.algorithms[algorithm_of(node)]
    return algorithm.qualified == "auto@cudnn" and registry.platforms()["cudnn"].unavailable() is None
