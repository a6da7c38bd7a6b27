"""select: finds the operations in the graph, decides on an algorithm for each, and puts ai3's operations in."""

from __future__ import annotations

import logging

from torch.fx import Graph, Node

from .. import registry
from ..ops import OPERATIONS
from ..selection import Decision, OpSpec
from ..selection import select as decide
from .context import Context, replace

log = logging.getLogger(__name__)


def run(graph: Graph, context: Context) -> None:
    found: list[tuple[Node, OpSpec]] = []
    for node in graph.nodes:
        specs = (operation.match(node) for operation in OPERATIONS.values()) if node.op == "call_function" else ()
        found.extend((node, spec) for spec in specs if spec is not None)
    registry.prepare({spec.operation for _, spec in found})

    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    static = {placeholders[i] for i in context.static_inputs} if context.is_inference else set()
    for name, operation in OPERATIONS.items():
        occurrences = [(node, spec) for node, spec in found if spec.operation == name]
        if occurrences:
            context.policy.selectors[name].check_count([spec for _, spec in occurrences])
        for index, (node, spec) in enumerate(occurrences):
            decision = _decide(context, index, spec)
            context.report.add(decision, node)
            log.debug("%s", context.report.rows[-1])
            if decision.chosen.platform != "torch":
                assert isinstance(decision.chosen, registry.Algorithm)
                with graph.inserting_before(node):
                    new = operation.emit(node, spec, decision.chosen.id, static.__contains__)
                context.report.rename(node, new)
                context.algorithms[decision.chosen.id] = decision.chosen
                replace(node, new)
    graph.eliminate_dead_code()
    context.report.sort_by(graph)


def _decide(context: Context, index: int, spec: OpSpec) -> Decision:
    selector = context.policy.selectors[spec.operation]
    return decide(
        spec,
        selector.text_for(index, spec),
        registry.algorithms(),
        context.system,
        default=OPERATIONS[spec.operation].default,
        strict=context.policy.strict,
    )
