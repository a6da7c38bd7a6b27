"""select: finds the operations in the graph, decides on an algorithm for each, and puts ai3's operations in."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch.fx import Graph, Node

from .. import registry, tuning
from ..errors import AlgorithmError
from ..ops import OPERATIONS, attention_graph
from ..ops.base import spec_of
from ..selection import Decision, OpSpec
from ..selection import select as choose
from .context import Context, algorithm_of, is_ai3, replace, static_nodes
from .neighbours import activation_ahead, is_concatenated, use_of

log = logging.getLogger(__name__)
# About what a copy, or a batch norm, takes in a network on an H200: its start, and both ways through memory.
_SECONDS_A_COPY, _BYTES_A_SECOND = 1.5e-6, 3e12


def run(graph: Graph, context: Context) -> None:
    found: list[tuple[Node, OpSpec]] = []
    for node in graph.nodes:
        specs = (operation.match(node) for operation in OPERATIONS.values()) if node.op == "call_function" else ()
        found.extend((node, spec) for spec in specs if spec is not None)
    registry.prepare((spec.operation, spec.device) for _, spec in found)

    _note_swapped(graph, context)
    static = static_nodes(graph, context) if context.is_inference else set()
    for name, operation in OPERATIONS.items():
        occurrences = [(node, spec) for node, spec in found if spec.operation == name]
        if occurrences:
            context.policy.selectors[name].check_count([spec for _, spec in occurrences])
        for index, (node, spec) in enumerate(occurrences):
            decision = decide(context, index, spec, node)
            context.report.add(decision, node)
            log.debug("%s", context.report.rows[-1])
            if decision.chosen.platform != "torch":
                assert isinstance(decision.chosen, registry.Algorithm)
                registry.platforms()[decision.chosen.platform].announce([decision.chosen], spec)
                with graph.inserting_before(node):
                    new = operation.emit(node, spec, decision.chosen, static.__contains__)
                context.report.rename(node, new)
                context.algorithms[decision.chosen.id] = decision.chosen
                replace(node, new)
    graph.eliminate_dead_code(attention_graph.is_impure)
    context.report.sort_by(graph)


def _note_swapped(graph: Graph, context: Context) -> None:
    """The operations of swapped modules are in the graph already, with the algorithms chosen for them in eager mode."""
    for node in graph.nodes:
        if not is_ai3(node):
            continue
        chosen = registry.by_id(algorithm_of(node))
        if chosen is None:
            raise AlgorithmError(
                label=str(node.target),
                message=f"the graph names the algorithm of id {algorithm_of(node)}, which is not registered here",
            )
        spec = spec_of(chosen.operation, node, node.args[0], {})
        context.report.add(Decision(spec, chosen.qualified, chosen, "chosen by swap_operation", (), False), node)
        context.algorithms[chosen.id] = chosen
        context.swapped.add(node)
        # As the passes write them: by name behind the algorithm.
        assert isinstance(node.target, torch._ops.OpOverload)
        names = [argument.name for argument in node.target._schema.arguments]
        last = names.index("algorithm") + 1
        node.kwargs = {**dict(zip(names[last:], node.args[last:])), **node.kwargs}
        node.args = node.args[:last]


def _with_passes(measured: Mapping[str, float], spec: OpSpec, node: Node, context: Context) -> Mapping[str, float]:
    """With the time of what algorithms leave to others: a copy into the concatenation that reads the result, and the
    batch norm ahead of them."""

    def seconds(shape: tuple[int, ...]) -> float:
        return _SECONDS_A_COPY + 2 * math.prod(shape) * spec.dtype.itemsize / _BYTES_A_SECOND

    copied, ahead, times = is_concatenated(node), activation_ahead(node, spec, context), dict(measured)
    for a in registry.known():
        if a.operation != spec.operation or a.qualified not in times:
            continue
        platform = registry.platforms()[a.platform]
        takes_norm = ahead is not None and platform.applies_prologues(a, ahead)
        if copied and (takes_norm or not platform.writes_slices(a)):  # what reads through a norm writes no slices
            times[a.qualified] += seconds(spec.output_shape)
        if ahead is not None and not takes_norm:
            times[a.qualified] += seconds(spec.input_shape)
    return times


def decide(context: Context, index: int, spec: OpSpec, node: Node) -> Decision:
    """What the selector of the operation chooses for its index-th occurrence, the node."""
    selector = context.policy.selectors[spec.operation]
    text = selector.text_for(index, spec)
    measured = None
    if "auto" in text.split("|"):
        measured = tuning.times(spec, use_of(node, spec, context))
        if spec.operation == "conv2d" and spec.device == "cuda" and context.is_inference and context.policy.fuse:
            measured = _with_passes(measured, spec, node, context)
    return choose(
        spec,
        text,
        registry.known(),
        context.system,
        default=registry.default_of(spec.operation),
        strict=context.policy.strict,
        measured=measured,
        max_workspace=context.policy.max_workspace,
    )
