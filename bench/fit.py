"""python -m bench fit FILE.json ...: the table that `guess` corrects the kernels' estimates by, from results of `cost`.
From results of `tiles` it is the rates of tiles on a GPU (tiles_fit.py).

For every algorithm and kind of convolution, log(time / estimate) as a sum of piecewise linear functions of the shape's
features: least squares, with penalties on a function's size and on its steps, so that what was not measured stays near
1 and near its neighbours. Times far from the best one's count less: which of two hopeless algorithms is worse decides
nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ai3_compile.selection import costs

from . import cost, tiles_fit

_CALL = 6e-6
"""Seconds of a call from Python, whatever it computes; inside a network it is less."""
_SIZE, _STEPS = 1.0, 3.0
"""Penalties."""
_NEAR, _FAR_WEIGHT = 2.0, 0.15
_FOLDS = 5
Row = Mapping[str, Any]
Fitted = dict[str, dict[str, costs.Piecewise]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=Path, help="results of `python -m bench cost`, one for each ISA, or of `tiles`"
    )


def main(given: argparse.Namespace) -> None:
    """Writes the table, keeping those of other vector instructions, and says how well its choices do.

    Rates of tiles are printed.
    """
    found = json.loads(costs.TABLE.read_text()) if costs.TABLE.exists() else {}
    for file in given.files:
        result = json.loads(file.read_text())
        if result["bench"] == "tiles":
            tiles_fit.main(result)
            continue
        rows = result["rows"]
        print(f"{result['isa']}, {result['cpu']}, {result['threads']} threads: {len(rows)} shapes")
        for label, chosen in (
            ("the kernels' own estimates", [cost.right(row, row["kernel's estimate"]) for row in rows]),
            (f"fitted, each shape judged by a fit to the others ({_FOLDS} parts)", held_out(rows)),
        ):
            print(f"  {label}: within 10 % of the best on " + _shares(rows, chosen))
        found[result["isa"]] = {
            name: {feature: [begin, [round(v, 3) for v in values]] for feature, (begin, values) in functions.items()}
            for name, functions in fit(rows).items()
        }
    costs.TABLE.write_text(_text(found))


def fit(rows: Sequence[Row]) -> Fitted:
    """The functions for every algorithm and kind, such that the factors' geometric mean over the rows is 1: users'
    algorithms have estimates in the kernels' own unit."""
    fitted: Fitted = {}
    names = sorted({name for row in rows for name in row["kernel's estimate"]})
    shift = _mean([_log_ratio(row, name) for row in rows for name in _near(row)])
    for name in names:
        for kind in (costs.DEPTHWISE, costs.GROUPED, costs.FIRST, costs.POINTWISE, costs.DENSE):
            chosen = [row for row in rows if name in row["kernel's estimate"] and _kind(row) == kind]
            if chosen:
                fitted[costs.name_of(name, kind)] = _fit_one(chosen, name, shift)
    return fitted


def held_out(rows: Sequence[Row]) -> list[float]:
    """For each row the time of the choice over the best one's, with a table fitted without the row's part."""
    parts = [i % _FOLDS for i in range(len(rows))]
    random.Random(0).shuffle(parts)
    fits = [fit([row for row, own in zip(rows, parts) if own != part]) for part in range(_FOLDS)]
    return [cost.right(row, _estimates(row, fits[part])) for row, part in zip(rows, parts)]


def _estimates(row: Row, fitted: Fitted) -> dict[str, float]:
    features, kind = _features(row), _kind(row)
    return {
        name: estimate * math.exp(costs.evaluate(fitted.get(costs.name_of(name, kind), {}), features))
        for name, estimate in row["kernel's estimate"].items()
    }


def _fit_one(rows: Sequence[Row], name: str, shift: float) -> dict[str, costs.Piecewise]:
    features = [_features(row) for row in rows]
    target = torch.tensor([_log_ratio(row, name) - shift for row in rows], dtype=torch.float64)
    weight = torch.tensor([1.0 if name in _near(row) else _FAR_WEIGHT for row in rows], dtype=torch.float64)
    begins, columns, penalties = {}, [], []
    for feature in features[0]:
        positions = torch.tensor([f[feature] for f in features], dtype=torch.float64)
        begin, end = math.floor(positions.min()), max(math.ceil(positions.max()), math.floor(positions.min()) + 1)
        begins[feature] = begin
        knots = torch.arange(begin, end + 1, dtype=torch.float64)
        columns.append((1 - (positions[:, None] - knots[None, :]).abs()).clamp(min=0))
        steps = torch.diff(torch.eye(len(knots), dtype=torch.float64), dim=0)
        penalties.append(_SIZE * torch.eye(len(knots), dtype=torch.float64) + _STEPS * steps.T @ steps)
    # The mean is left free: it belongs to the algorithm, not to a feature.
    mean = (weight * target).sum() / weight.sum()
    matrix = torch.cat(columns, dim=1)
    normal = matrix.T @ (weight[:, None] * matrix) + torch.block_diag(*penalties)
    values = torch.linalg.solve(normal, matrix.T @ (weight * (target - mean)))
    found, place = {}, 0
    for (feature, begin), column in zip(begins.items(), columns):
        found[feature] = (begin, tuple(values[place : place + column.shape[1]].tolist()))
        place += column.shape[1]
    first = next(iter(found))
    found[first] = (found[first][0], tuple(value + float(mean) for value in found[first][1]))
    return found


def _log_ratio(row: Row, name: str) -> float:
    return math.log(max(row["seconds"][name] - _CALL, 1e-6) * 1e9 / row["kernel's estimate"][name])


def _near(row: Row) -> list[str]:
    names = list(row["kernel's estimate"])
    best = min(row["seconds"][name] for name in names)
    return [name for name in names if row["seconds"][name] < _NEAR * best]


def _kind(row: Row) -> str:
    return costs.kind_of(row["input"][1], row["weight"], row["groups"])


def _features(row: Row) -> dict[str, float]:
    stride = row["stride"]
    pair = (stride, stride) if isinstance(stride, int) else stride
    return costs.features_of(row["input"], row["output"], row["weight"], row["groups"], pair)


def _shares(rows: Sequence[Row], losses: Sequence[float]) -> str:
    parts = []
    for kind in (cost.GRID, cost.NETWORKS):
        own = [loss for row, loss in zip(rows, losses) if row["set"] == kind]
        if own:
            parts.append(f"{kind}: {sum(loss <= cost.NEAR for loss in own) / len(own) * 100:.1f} %")
    return ", ".join(parts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _text(found: Mapping[str, Any]) -> str:
    """A line for each function: a change of the table is read in a diff."""
    blocks = []
    for isa, fitted in sorted(found.items()):
        names = []
        for name, functions in fitted.items():
            lines = ",\n".join(f"   {json.dumps(feature)}: {json.dumps(f)}" for feature, f in functions.items())
            names.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
        blocks.append(f" {json.dumps(isa)}: {{\n" + ",\n".join(names) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
