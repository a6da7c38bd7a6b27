"""A report as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .rows import Row

WIDTH = 118
_HEADER = ("module", "operation", "input", "algorithm", "why")


def format_rows(rows: Sequence[Row], title: str = "", rest: str = "") -> str:
    """Two lines a row: what was chosen and why, and why nothing else was; at the end what runs the rest."""
    lines = [_cells(row) for row in rows]
    widths = [max(len(line[i]) for line in [_HEADER, *lines]) for i in range(4)]
    out = [title] if title else []
    out.append(_join(_HEADER, widths))
    out.append("-" * min(WIDTH, len(out[-1]) + 30))
    for row, line in zip(rows, lines):
        out.append(_join(line, widths))
        if row.algorithm != "fused" and row.rejected:
            against = "; ".join(f"{name}: {reason}" for name, reason in row.rejected.items())
            out.extend(textwrap.wrap(f"not {against}", WIDTH, initial_indent="    ", subsequent_indent="        "))
    if rest:
        out.append(f"everything else runs in {rest}")
    return "\n".join(out)


def _cells(row: Row) -> tuple[str, ...]:
    return (row.name or "(no module)", row.operation, "x".join(map(str, row.input_shape)), row.computed, row.why)


def _join(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join([cell.ljust(width) for cell, width in zip(cells, widths)] + [cells[-1]])
