"""The rates of kernels/include/ai3/gemm_time.cuh by results of `tiles`.

For each precision, and of patches of the image and of other tiles apart, those by which log(estimate / time) is
smallest. Tiles much slower than a layer's fastest count less, and rates that the results tell nothing of stay.
Estimates that are nearer may still choose worse, among tiles that take nearly the same: what the choices cost with
either rates is printed beside them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import statistics
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


@dataclasses.dataclass(frozen=True)
class Tile:
    """One that was measured: by what rates its time is estimated, None where by none, and how."""

    rates: str | None
    time: Callable[[Sequence[float]], float]
    nanoseconds: float
    weight: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """Of one precision and kind of tile; the errors are weighted root mean squares."""

    before: list[float]
    after: list[float]
    error_before: float
    error_after: float


def main(result: Mapping[str, Any]) -> None:
    """Prints the rates as gemm_time.cuh has them, how far the estimates are off, and what their choices cost."""
    layers, rates = read(result["rows"])
    fits = fit(layers, rates)
    for name, found in fits.items():
        print(f"{name}: off by {found.error_before * 100:.0f} %, {found.error_after * 100:.0f} % with")
        print("  {" + ", ".join(f"{rate:.4g}" for rate in found.after) + "}  instead of")
        print("  {" + ", ".join(f"{rate:.4g}" for rate in found.before) + "}")
    after = {name: found.after for name, found in fits.items()}
    costs = (chosen_over_fastest(layers, by) for by in (rates, after))
    print("the tile of the lowest estimate takes {:.3f} of the fastest one's time, {:.3f} with them".format(*costs))


def read(rows: Sequence[Mapping[str, Any]]) -> tuple[list[list[Tile]], dict[str, list[float]]]:
    """The tiles of each layer, and the rates that there are by precision and kind of tile.

    Raises ValueError where this checkout has no such tile, or gives it another share of the shared memory.
    """
    _, library = tiles.implicit_gemm()
    layers: list[list[Tile]] = []
    rates: dict[str, list[float]] = {}
    for row in rows:
        args = tiles.arguments(row)
        known = {(d.name.decode(), key[1]): (key, d) for key, d in tiles.tiles_of(library, args).items()}
        fastest = min(tile["microseconds"] for tile in row["tiles"])
        layers.append([])
        for tile in row["tiles"]:
            found = known.get((tile["tile"], tile["splits"]))
            if found is None or found[1].shared != tile["shared memory"]:
                layer = f"{tiles.title(row['group'], row['layer'])} {row['precision']}"
                raise ValueError(f"{layer}: {tile['tile']} is another tile here than what was measured")
            (number, splits), described = found
            name = None
            if not tile["tile"].endswith(_APART):
                is_patch = tile["tile"].endswith(("_halo", "_resident"))
                name = f"{row['precision']}, {'patches of the image' if is_patch else 'other tiles'}"
                rates[name] = list(described.rates[: described.rate_count])
            time = timer(library, args, number, splits)
            weight = (fastest / tile["microseconds"]) ** _FAR
            layers[-1].append(Tile(name, time, tile["microseconds"] * 1e3, weight))
    return layers, rates


def fit(layers: Sequence[Sequence[Tile]], rates: Mapping[str, list[float]]) -> dict[str, Fit]:
    """By precision and kind of tile."""
    found = {}
    for name, before in rates.items():
        terms = [tile for layer in layers for tile in layer if tile.rates == name]
        after = _least(lambda tried: _error(terms, tried) ** 2 + _moved(tried, before), before)  # noqa: B023
        found[name] = Fit(before, after, _error(terms, before), _error(terms, after))
    return found


def chosen_over_fastest(layers: Sequence[Sequence[Tile]], rates: Mapping[str, list[float]]) -> float:
    """The geometric mean over layers, each one's tile chosen by estimates of these rates."""
    losses = []
    for layer in layers:
        chosen = min(layer, key=lambda tile: tile.time(rates[tile.rates] if tile.rates else ()))
        losses.append(chosen.nanoseconds / min(tile.nanoseconds for tile in layer))
    return statistics.geometric_mean(losses)


def timer(library: ctypes.CDLL, args: Any, number: int, splits: int) -> Callable[[Sequence[float]], float]:
    """The nanoseconds that the model gives a tile by rates; by those that it has where there are none."""

    def time(rates: Sequence[float]) -> float:
        described = tiles.Described()
        given = (ctypes.c_double * len(rates))(*rates) if rates else None
        library.ai3_describe_tile(args, number, splits, given, described)
        return described.time

    return time


def _error(terms: Sequence[Tile], rates: Sequence[float]) -> float:
    squares = [tile.weight * math.log(tile.time(rates) / tile.nanoseconds) ** 2 for tile in terms]
    return math.sqrt(sum(squares) / sum(tile.weight for tile in terms))


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
