"""How long calls take on a GPU, without the CPU's share: each as a CUDA graph of several runs, replayed in turn."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

log = logging.getLogger(__name__)

_WARM_UP = 3
# Seconds that the runs of one graph should take, and how many at most: events tell about a microsecond, and a graph
# takes some to start.
_LONG_ENOUGH, _MAX_RUNS = 3e-3, 50
# A call that takes less when it is timed alone may well be timed for the CPU's share of it.
_MAYBE_WAITING = 3e-4
# A call this many times slower than the best so far is not measured further.
_HOPELESS = 8.0
# Of what takes no longer, by the clock, than what is not counted.
_LEAST = 1e-9


def evict(device: int) -> Callable[[], Any]:
    """What leaves nothing in a GPU's L2 cache of what was there, by reading half more than it holds."""
    held, row = torch.cuda.get_device_properties(device).L2_cache_size, 4096
    read = torch.zeros(held * 3 // 2 // 4 // row, row, device=f"cuda:{device}")
    found = torch.empty(read.shape[0], device=read.device)
    return lambda: torch.amax(read, dim=1, out=found)


def seconds(
    calls: Mapping[str, Callable[[], Any]], rounds: int = 5, before: Mapping[str, Callable[[], Any]] | None = None
) -> dict[str, float]:
    """Median seconds of each call. One that cannot be captured, as where it waits for the device, is timed as it is;
    one that fails is left out, and said. `before` has for each call what runs ahead of each of its runs and is not
    counted: work that takes as long for all of them."""
    stream = torch.cuda.Stream()
    taken: dict[str, list[float]] = {}
    runs: dict[str, tuple[Callable[[], Any], int]] = {}
    uncounted = [0.0]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        if before:
            run_before = _captured([next(iter(before.values()))], _MAX_RUNS, stream)
            uncounted = [_timed(*run_before)]
        for name, call in calls.items():
            try:
                for _ in range(_WARM_UP):
                    call()
                once = min(_timed(call, 1) for _ in range(3))
            except RuntimeError as error:  # an algorithm's own failure, or too little memory
                log.warning("%s is left out of what is measured: it failed: %s", name, error)
                continue
            count = _MAX_RUNS if once < _MAYBE_WAITING else min(_MAX_RUNS, math.ceil(_LONG_ENOUGH / once))
            runs[name] = _captured([before[name], call] if before else [call], count, stream)
            taken[name] = [_timed(*runs[name])]
        best = min((min(found) for found in taken.values()), default=math.inf) - uncounted[0]
        for _ in range(rounds):
            if before:
                uncounted.append(_timed(*run_before))
            for name, run in runs.items():
                if taken[name][0] - uncounted[0] < _HOPELESS * best:
                    taken[name].append(_timed(*run))
    torch.cuda.current_stream().wait_stream(stream)
    less = statistics.median(uncounted)
    return {name: max(statistics.median(found) - less, _LEAST) for name, found in taken.items()}


def _captured(
    calls: Sequence[Callable[[], Any]], count: int, stream: torch.cuda.Stream
) -> tuple[Callable[[], Any], int]:
    """What runs the calls `count` times, and that count."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                for call in calls:
                    call()
    except RuntimeError:  # it waits, or allocates otherwise than through PyTorch
        torch.cuda.synchronize()
        return lambda: [call() for call in calls], 1
    graph.replay()
    return graph.replay, count


def _timed(run: Callable[[], Any], count: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count
