"""The picture of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MissingPackageError

if TYPE_CHECKING:
    from .compare import Comparison

_GROUP = 0.8


def draw(comparison: Comparison, path: Path) -> None:
    """Bars of each algorithm's time over torch's, grouped by shape; refused ones have none."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError(purpose="a plot", package="matplotlib") from None

    ratios = {(row.shape, row.algorithm): row.ratio for row in comparison.rows}
    shapes = list(dict.fromkeys(shape for shape, _ in ratios))
    names = [name for name in dict.fromkeys(name for _, name in ratios) if name != "torch"]
    inches = max(7.0, 0.22 * len(shapes) * (len(names) + 2) + 3.5)
    figure = Figure(figsize=(inches, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = _GROUP / max(len(names), 1)
    for i, name in enumerate(names):
        places = [at - _GROUP / 2 + (i + 0.5) * width for at in range(len(shapes))]
        found = [ratios.get((shape, name)) for shape in shapes]
        axes.bar(places, [ratio or 0.0 for ratio in found], width, label=name, color=f"C{i}")
        for at, ratio in zip(places, found):
            if ratio is None:
                axes.text(at, 0, " refused", rotation=90, fontsize=7, ha="center", va="bottom", color=f"C{i}")
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--", label="torch")
    axes.set_xticks(range(len(shapes)), [shape.replace(", ", "\n") for shape in shapes], fontsize=8)
    axes.set_xlabel("shape")
    axes.set_ylabel("time over torch's (lower is faster)")
    axes.set_title(comparison.title, fontsize=10)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)
