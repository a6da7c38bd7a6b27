"""What the machine does at most: FMA peak, read and copy bandwidth, with one thread and with PyTorch's number."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ai3_compile.backends import builder

from . import machine, timing

GFLOPS, READ, COPY = "FMA GFLOP/s", "read GB/s", "copy GB/s"
_REPEATS = 5
_ROUNDS = 10_000_000  # some 50 ms: starting the threads does not count
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

Peak = dict[str, dict[str, float]]
"""For each of the three figures, the number of threads (as text, for JSON) and the best of several measurements."""


def measure() -> Peak:
    """Copy counts what is read and what is written. Raises BuildError where the program cannot be compiled."""
    library = _library()
    count = _buffer_bytes() // 4
    source, target = torch.ones(count), torch.ones(count)
    figures: dict[str, Callable[[int], float]] = {
        GFLOPS: lambda threads: library.bench_multiply_add(threads, _ROUNDS),
        READ: lambda threads: library.bench_read(threads, source.data_ptr(), count),
        COPY: lambda threads: library.bench_copy(threads, target.data_ptr(), source.data_ptr(), count),
    }
    time.sleep(timing.REST)
    return {
        name: {
            str(threads): max(figure(threads) for _ in range(_REPEATS)) / 1e9
            for threads in sorted({1, torch.get_num_threads()})
        }
        for name, figure in figures.items()
    }


def higher(first: Peak, second: Peak) -> Peak:
    """The higher of two measurements, figure by figure: whatever disturbs one makes it lower."""
    return {name: {n: max(value, second[name][n]) for n, value in found.items()} for name, found in first.items()}


@functools.cache
def _library() -> ctypes.CDLL:
    request = builder.kernel_request(
        "bench-peak", (Path(__file__).with_name("peak.cpp"),), flags=["-pthread"], link_flags=["-pthread"]
    )
    library = ctypes.CDLL(str(builder.build_many([request])[0]))
    pointer, integer, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.bench_multiply_add.argtypes = [integer, count]
    library.bench_read.argtypes = [integer, pointer, count]
    library.bench_copy.argtypes = [integer, pointer, pointer, count]
    for function in (library.bench_multiply_add, library.bench_read, library.bench_copy):
        function.restype = ctypes.c_double
    return library


def _buffer_bytes() -> int:
    """Twice the last cache, so that memory is measured, and no more than an eighth of what is free."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    last = max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=32 * 2**20)
    return min(max(2 * last, 2**28), max(machine.available_memory() // 8, 2**26))
