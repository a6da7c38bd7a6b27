"""The rows of a report, filled by the passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.fx import Graph, Node

from ..selection import Decision
from .table import format_rows


@dataclass
class Row:
    """One operation of a compiled network."""

    operation: str
    name: str
    """Module path, as in `model.get_submodule`; empty for a call outside a module."""
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: str
    algorithm: str
    """`algorithm@platform`; `fused` where the operation runs inside another row's, which `why` names, or is left out,
    for the reason there."""
    why: str
    rejected: dict[str, str]
    """Every other algorithm and the reason against it."""
    fused: list[str] = field(default_factory=list)
    """What runs inside this operation: batch_norm, add, hardswish; concat, where it writes into a concatenation."""
    prologue: list[str] = field(default_factory=list)
    """What runs inside this operation on its input: batch_norm, relu."""
    chosen: str = ""
    """As `algorithm`, also where the operation was then fused into another."""
    selector: str = ""
    """What the user asked for this operation."""
    by_policy: bool = False
    """Whether `default` or `guess` chose."""

    @property
    def computed(self) -> str:
        """The algorithm with all that runs inside it: `batch_norm + relu -> gemm@cpp + add`."""
        stages = [self.prologue] if self.prologue else []
        return " -> ".join(" + ".join(stage) for stage in [*stages, [self.algorithm, *self.fused]])

    def __str__(self) -> str:
        against = "; ".join(f"{name}: {reason}" for name, reason in self.rejected.items())
        shape = "x".join(map(str, self.input_shape))
        return f"{self.operation} {self.name} {shape}: {self.computed} ({self.why}); not {against}"


_OF_GRAPHS_ON_GPUS = ("inputs", "static", "calls", "obstacle")


class GraphReport:
    """The rows of one captured graph, in the order of the graph."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.rest = ""
        """What runs the operations that ai3 does not; empty where the user could not choose."""
        self.inputs = 0
        """How many the graph has, and which of them are weights, and the operations to run before it is captured: of
        a graph on a GPU (on_gpu.py)."""
        self.static: list[int] = []
        self.calls: list[Any] = []
        self.obstacle: str | None = None
        """Why it is no CUDA graph of ai3's own (cuda_graph.py), where one was asked for."""
        self.rows: list[Row] = []
        self._nodes: dict[Node, Row] = {}

    def clear(self) -> None:
        """Forgets the rows."""
        self.rows.clear()
        self._nodes.clear()

    def add(self, decision: Decision, node: Node | None) -> None:
        """The row of a decision, and of the graph's node that it is about."""
        spec = decision.spec
        row = Row(
            operation=spec.operation,
            name=spec.name,
            input_shape=spec.input_shape,
            output_shape=spec.output_shape,
            dtype=str(spec.dtype).removeprefix("torch."),
            algorithm=decision.chosen.qualified,
            why=decision.why,
            rejected={r.algorithm: r.reason for r in decision.rejected},
            chosen=decision.chosen.qualified,
            selector=decision.selector,
            by_policy=decision.by_policy,
        )
        self.rows.append(row)
        if node is not None:
            self._nodes[node] = row

    def add_without_input(self, operation: str, name: str, algorithm: str, why: str) -> None:
        """The row of a module whose input is not known."""
        self.rows.append(Row(operation, name, (), (), "", algorithm, why, {}))

    def rename(self, old: Node, new: Node) -> None:
        """The row of `old` is now computed by `new`."""
        if old in self._nodes:
            self._nodes[new] = self._nodes.pop(old)

    def fused(self, node: Node, absorbed: Node, what: str, before: bool = False) -> None:
        """`absorbed` now runs inside `node`: behind its operation, or before all that does so already."""
        host = self._nodes[node]
        if before:
            host.prologue.insert(0, what)
        else:
            host.fused.append(what)
        row = self._nodes.pop(absorbed, None)
        if row is not None:
            row.algorithm, row.why = "fused", f"runs inside {host.operation} {host.name or '(no module)'}"

    def left_out(self, node: Node, why: str) -> None:
        """Nothing runs for this operation."""
        row = self._nodes.pop(node, None)
        if row is not None:
            row.algorithm, row.why = "fused", f"left out: {why}"

    def sort_by(self, graph: Graph) -> None:
        """Puts the rows in the order of the graph; they are made operation by operation."""
        order = {node: index for index, node in enumerate(graph.nodes)}
        places = {id(row): order.get(node, len(order)) for node, row in self._nodes.items()}
        self.rows.sort(key=lambda row: places[id(row)])

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("name", "rest", *_OF_GRAPHS_ON_GPUS)}
        return {**fields, "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GraphReport:
        report = cls(data["name"])
        report.rest = data.get("rest", "")
        for name in _OF_GRAPHS_ON_GPUS:
            setattr(report, name, data.get(name, getattr(report, name)))
        for row in data["rows"]:
            shapes = {key: tuple(row[key]) for key in ("input_shape", "output_shape")}
            report.rows.append(Row(**{**row, **shapes}))
        return report


class Report:
    """All rows of one compiled model: more than one graph where Dynamo broke it, or recompiled it for other shapes."""

    def __init__(self) -> None:
        self.graphs: list[GraphReport] = []

    @property
    def rows(self) -> list[Row]:
        return [row for graph in self.graphs for row in graph.rows]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "ai3: none of the operations whose algorithm can be chosen occurs in this model."
        titles = [f"graph {i}: {g.name}" if len(self.graphs) > 1 else "" for i, g in enumerate(self.graphs)]
        return "\n\n".join(
            format_rows(graph.rows, title, graph.rest) for graph, title in zip(self.graphs, titles) if graph.rows
        )
