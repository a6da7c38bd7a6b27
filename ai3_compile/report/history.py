"""The reports of this process: one a compiled model, the graphs of one call together."""

from __future__ import annotations

import weakref

from torch._guards import TracingContext
from torch.fx import GraphModule

from .rows import GraphReport, Report

_reports: list[Report] = []
# Enough for a session; a service that compiles for ever keeps no more.
_LIMIT = 256
_made = 0
_last_context: weakref.ref[TracingContext] | None = None


def reports() -> tuple[Report, ...]:
    """The reports of the models compiled in this process, oldest first (the last 256)."""
    return tuple(_reports)


def last_report() -> Report:
    """What ai3 chose in the model that was compiled last; printing it shows a table.

    Raises LookupError where nothing has been compiled yet: `torch.compile` compiles at the first call of the model.
    """
    if not _reports:
        raise LookupError(
            "ai3 has compiled nothing yet in this process: torch.compile compiles when the model is first called."
        )
    return _reports[-1]


def add(graph: GraphReport, *, continues: bool) -> None:
    """Adds a graph: to the last report where it is a part of the same function, behind a graph break or split off."""
    global _made, _last_context
    context = TracingContext.try_get()
    # DDPOptimizer splits what Dynamo captured, and calls the backend for each part of it.
    continues = continues or (context is not None and _last_context is not None and _last_context() is context)
    _last_context = None if context is None else weakref.ref(context)
    if not (continues and _reports):
        _made += 1
        _reports.append(Report())
        del _reports[:-_LIMIT]
    _reports[-1].graphs.append(graph)


def mark() -> int:
    """A place in the history, for `since`."""
    return _made


def since(place: int) -> list[Report]:
    """The reports made after a mark, as far as they are kept."""
    return _reports[len(_reports) - min(_made - place, len(_reports)) :]


def is_continuation(gm: GraphModule) -> bool:
    """Whether Dynamo captured this graph from the rest of a function behind a graph break."""
    traces = (node.stack_trace for node in gm.graph.nodes if node.stack_trace)
    return any("torch_dynamo_resume_in" in trace for trace in traces)


def clear() -> None:
    _reports.clear()
