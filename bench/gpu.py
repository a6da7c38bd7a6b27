"""How the benches time on a GPU, in which precision, and what machine it was."""

from __future__ import annotations

import math
import statistics
import subprocess
from collections.abc import Mapping
from typing import Any

import torch

from . import machine, timing

# Events tell half a microsecond, and the clock of an idle GPU is low: the calls of one timing take this long.
_LONG_ENOUGH = 0.01
_MOST = 2000


def describe() -> dict[str, object]:
    """The GPU, its driver and clocks, and the versions of NVIDIA's libraries; SystemExit where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "There is no NVIDIA GPU that PyTorch can use: `python -m ai3_compile doctor` says what is missing."
        )
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu memory GiB": round(properties.total_memory / 2**30, 1),
        "driver": _smi("driver_version"),
        "clocks MHz": {"now": _smi("clocks.sm"), "highest": _smi("clocks.max.sm"), "memory": _smi("clocks.mem")},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": machine.version("triton"),
    }


def where(result: Mapping[str, Any]) -> str:
    return f"{result['gpu']}, torch {result['versions']['torch']}, cuDNN {result['cudnn']}"


def _smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def medians(sides: Mapping[str, timing.Side], rounds: int) -> dict[str, float]:
    """Median seconds a call of each side. A round has all sides in turn; a first one is not counted."""
    counts = {}
    for name, side in sides.items():
        # The best of some: what the machine did beside one of them would leave too few calls in every round.
        shortest = min(_timed(side, 5) for _ in range(4))
        counts[name] = max(3, min(_MOST, math.ceil(_LONG_ENOUGH / shortest)))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            taken = _timed(side, counts[name])
            if number > 0:
                times[name].append(taken)
    return {name: statistics.median(found) for name, found in times.items()}


def _timed(side: timing.Side, count: int) -> float:
    """Behind a call that is not counted: while the GPU does that one, the CPU is ahead by the next, as in a loop."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    side()
    begin.record()
    for _ in range(count):
        side()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count
