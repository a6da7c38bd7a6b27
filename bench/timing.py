"""How every bench times: all sides in one process, in rounds, each after a rest; and what is made of the times."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

# The threads of ONNX Runtime and OpenMP go on spinning for some milliseconds after a call, and would take the cores
# from whoever is timed next: every side begins after a rest, with a call that is not timed.
REST = 0.03
LONG = 0.15
"""Seconds from which on one timed call a round is enough."""
CALLS = 3
"""Timed calls a round of what takes less."""

Side = Callable[[], object]


def medians(sides: Mapping[str, Side], rounds: int, rest: float = REST) -> dict[str, float]:
    """Median seconds of each side. A round has all sides in turn, so that a drift of the machine meets them all.

    A first round is not counted: it warms up caches, clocks and what adapts itself to its calls.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            time.sleep(rest)
            calls = 1 if _seconds(side) >= LONG else CALLS
            if number > 0:
                times[name].extend(_seconds(side) for _ in range(calls))
    return {name: statistics.median(found) for name, found in times.items()}


def _seconds(side: Side) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def geometric_mean(ratios: Iterable[float]) -> float | None:
    """None of no ratios."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.fmean(logs)) if logs else None
