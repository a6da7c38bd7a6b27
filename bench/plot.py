"""The pictures of a result: networks as bars of ratios to the best peer, layers as bars grouped by shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import gpu, gpu_models, models, peak

_GROUP = 0.8
NEEDS = "no plot: matplotlib is not installed"


def draw(result: Mapping[str, Any], path: Path) -> bool:
    """Draws the results that have a picture; whether this one has. Raises ImportError without matplotlib."""
    drawing = {"models": _models, "conv2d": _layers, "linear": _layers}.get(result["bench"])
    if drawing is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    drawing(figure, result)
    figure.savefig(path, dpi=150)
    return True


def _models(figure: Any, result: Mapping[str, Any]) -> None:
    """Of each network and batch ai3's times over the best peer's, the name of that peer beside the bars."""
    rows = result["rows"][::-1]  # the first on top
    given = gpu_models.RATIOS if result.get("device") == "cuda" else models.RATIOS
    ratios = {key: side for key, side in given.items() if any(row[key] for row in rows)}
    figure.set_size_inches(8, 1.5 + (0.2 + 0.1 * len(ratios)) * len(rows))
    axes = figure.add_subplot()
    height = _GROUP / max(len(ratios), 1)
    for i, (key, side) in enumerate(ratios.items()):
        places = [at + _GROUP / 2 - (i + 0.5) * height for at in range(len(rows))]
        values = [row[key] or 0.0 for row in rows]
        bars = axes.barh(places, values, height, label=side, color=f"C{i}")
        labels = [f"{row[key]:.2f}" if row[key] else "not measured" for row in rows]
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # hides the line at 1
        axes.bar_label(bars, labels, fontsize=7, padding=2, bbox=behind)
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--", label="the best peer", zorder=0)
    where = [", ".join([row["model"], f"batch {row['batch']}", *filter(None, [row.get("precision")])]) for row in rows]
    labels = [f"{name}\n(best peer: {row['best peer'] or 'none'})" for name, row in zip(where, rows)]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_xlabel("time over that of the best peer (lower is faster)")
    measured = {name for row in rows for name in row["milliseconds"]} - set(given.values())
    peers_there = [name for name, said in result["sides"].items() if name in measured and "not measured" not in said]
    axes.set_title(f"{_where(result)}\npeers: {', '.join(peers_there)}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)


_SHADES = {"cpp": "Oranges", "cuda": "Oranges", "cudnn": "Blues", "cublas": "Greens"}
_PEERS = "Greys"


def _colors(names: Sequence[str]) -> list[Any]:
    """Matplotlib's ten; of more sides each platform has shades of a colour, peers of grey."""
    if len(names) <= 10:
        return [f"C{number}" for number in range(len(names))]
    from matplotlib import colormaps

    shades = [_SHADES.get(name.partition("@")[2], _PEERS) for name in names]
    found = []
    for number, shade in enumerate(shades):
        share = (shades[:number].count(shade) + 1) / shades.count(shade)
        found.append(colormaps[shade](0.25 + 0.65 * share))
    return found


def _layers(figure: Any, result: Mapping[str, Any]) -> None:
    """A panel for each group of shapes. On the CPU effective GFLOP/s of each side, and the measured peak; on a GPU for
    each precision the speed of each side over the fastest one's, whose rate is below: rates differ a hundredfold."""
    on_gpu = result.get("device") == "cuda"
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        name = ", ".join(row[key] for key in ("group", "precision") if key in row) or result["bench"]
        groups.setdefault(name, []).append(row)
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["GFLOP/s"]))
    longest = max(len(rows) for rows in groups.values())
    figure.set_size_inches(max(7.0, 1.6 * longest + 2), 0.8 + 2.8 * len(groups))
    best = result["peak"][peak.GFLOPS][str(result["threads"])] if "peak" in result else None
    width, colors = _GROUP / len(names), _colors(names)
    for panel, (group, rows) in enumerate(groups.items()):
        axes = figure.add_subplot(len(groups), 1, panel + 1)
        fastest = [max(row["GFLOP/s"].values()) for row in rows]
        for i, name in enumerate(names):
            places = [at - _GROUP / 2 + (i + 0.5) * width for at in range(len(rows))]
            rates = [row["GFLOP/s"].get(name, 0.0) / (most if on_gpu else 1) for row, most in zip(rows, fastest)]
            axes.bar(places, rates, width, label=None if panel else name, color=colors[i])
        if best is not None:
            label = None if panel else "measured FMA peak"
            axes.axhline(best, color="black", linewidth=1, linestyle="--", label=label)
        labels = [row["shape"].replace(" ", "\n", 1) for row in rows]
        if on_gpu:
            labels = [f"{label}\n{most / 1e3:.3g} TFLOP/s" for label, most in zip(labels, fastest)]
        axes.set_xticks(range(len(rows)), labels, fontsize=7)
        axes.set_ylabel("speed over the fastest's" if on_gpu else "effective GFLOP/s", fontsize=8)
        axes.set_title(group, fontsize=9)
        axes.grid(axis="y", linewidth=0.4)
        axes.set_axisbelow(True)
    figure.suptitle(f"{result['bench']}, {_where(result)}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=5 if len(names) <= 10 else 4, fontsize=8 if len(names) <= 10 else 7)


def _where(result: Mapping[str, Any]) -> str:
    if result.get("device") == "cuda":
        return gpu.where(result)
    return f"{result['threads']} threads of {result['cpu']} ({result['isa']}), torch {result['versions']['torch']}"
