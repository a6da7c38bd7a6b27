"""The rates of kernels/include/ai3/gemm_time.cuh by results of `tiles`.

For each precision, and of patches of the image and of other tiles apart, those by which log(estimate / time) is
smallest. Tiles much slower than a layer's fastest count less, and rates that the results tell nothing of stay.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import tiles

_FAR = 1.5
"""A tile of twice the fastest one's time counts by two to the power of minus this."""
_STAY = 1.5e-3
"""Penalty on the mean square of log(rate / the rate before)."""
_STEPS = (0.2, 0.1, 0.05, 0.02, 0.01)
# Whose time is not by rates.
_APART = ("_thin", "_stream")


def main(result: Mapping[str, Any]) -> None:
    """Prints the rates as gemm_time.cuh has them, and how far the estimates are off before and after."""
    for name, (before, after, error, error_after) in fit(result["rows"]).items():
        print(f"{name}: off by {error * 100:.0f} %, {error_after * 100:.0f} % with")
        print("  {" + ", ".join(f"{rate:.4g}" for rate in after) + "}  instead of")
        print("  {" + ", ".join(f"{rate:.4g}" for rate in before) + "}")


def fit(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float], float, float]]:
    """By precision and kind of tile: rates before and after, and the weighted root mean square of the errors by each.

    Raises ValueError where this checkout has no such tile, or gives it another share of the shared memory.
    """
    _, library = tiles.implicit_gemm()
    groups: dict[str, list[tuple[Callable[[Sequence[float]], float], float, float]]] = {}
    rates: dict[str, list[float]] = {}
    for row in rows:
        args = tiles.arguments(row)
        known = {(d.name.decode(), key[1]): (key, d) for key, d in tiles.tiles_of(library, args).items()}
        fastest = min(tile["microseconds"] for tile in row["tiles"])
        for tile in row["tiles"]:
            found = known.get((tile["tile"], tile["splits"]))
            if found is None or found[1].shared != tile["shared memory"]:
                layer = f"{tiles.title(row['group'], row['layer'])} {row['precision']}"
                raise ValueError(f"{layer}: {tile['tile']} is another tile here than what was measured")
            if tile["tile"].endswith(_APART):
                continue
            (number, splits), described = found
            is_patch = tile["tile"].endswith(("_halo", "_resident"))
            name = f"{row['precision']}, {'patches of the image' if is_patch else 'other tiles'}"
            rates[name] = list(described.rates[: described.rate_count])
            weight = (fastest / tile["microseconds"]) ** _FAR
            time = timer(library, args, number, splits)
            groups.setdefault(name, []).append((time, tile["microseconds"] * 1e3, weight))
    found_rates = {}
    for name, terms in groups.items():
        before = rates[name]
        after = _least(lambda tried: _error(terms, tried) ** 2 + _moved(tried, before), before)  # noqa: B023
        found_rates[name] = (before, after, _error(terms, before), _error(terms, after))
    return found_rates


def timer(library: ctypes.CDLL, args: Any, number: int, splits: int) -> Callable[[Sequence[float]], float]:
    """The nanoseconds that the model gives a tile by rates."""

    def time(rates: Sequence[float]) -> float:
        described = tiles.Described()
        library.ai3_describe_tile(args, number, splits, (ctypes.c_double * len(rates))(*rates), described)
        return described.time

    return time


def _error(terms: Sequence[tuple[Callable[[Sequence[float]], float], float, float]], rates: Sequence[float]) -> float:
    squares = [weight * math.log(time(rates) / measured) ** 2 for time, measured, weight in terms]
    return math.sqrt(sum(squares) / sum(weight for _, _, weight in terms))


def _moved(rates: Sequence[float], before: Sequence[float]) -> float:
    moves = [math.log(rate / old) ** 2 for rate, old in zip(rates, before) if old != 0]
    return _STAY * sum(moves) / len(moves)


def _least(loss: Callable[[Sequence[float]], float], start: Sequence[float]) -> list[float]:
    """One rate after another is moved as long as that helps, by ever smaller steps; a rate of 0 stays so."""
    best, least = list(start), loss(start)
    for step in _STEPS:
        improved = True
        while improved:
            improved = False
            for i, factor in (
                (i, f) for i in range(len(best)) if best[i] != 0 for f in (math.exp(step), math.exp(-step))
            ):
                tried = [*best[:i], best[i] * factor, *best[i + 1 :]]
                if (found := loss(tried)) < least * (1 - 1e-6):
                    best, least, improved = tried, found, True
    return best
