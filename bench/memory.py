"""How much memory one call takes beyond what its process holds: the kernel's high-water mark, reset before the call.

Measured in a process of its own (`python -m bench.memory MODEL BATCH SIDE...`), whose C library gives every larger
piece of memory back when it is freed: otherwise what earlier calls have left behind would hide what a call takes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import machine, peers

SIDES = ("eager", "channels_last", "inductor", peers.COMPILED, peers.CONVERTED)
"""Those whose memory is PyTorch's: the others keep theirs from the first call to the last."""
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
# One arena: what is free in the others is not given back by malloc_trim, and would hide what a call takes.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**10), "MALLOC_ARENA_MAX": "1"}


def unmeasurable() -> str | None:
    """None where this system can measure it, else the reason."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError as error:
        return f"the high-water mark of memory cannot be reset: {error}"
    return None


def measure(model: str, batch: int, sides: Sequence[str]) -> dict[str, float]:
    """MiB that a call of each side adds at its peak; smaller pieces than 64 KiB are not seen.

    Raises CalledProcessError where the process fails.
    """
    command = [sys.executable, "-m", "bench.memory", model, str(batch), *sides]
    environment, folder = {**os.environ, **_ALLOCATOR}, Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def release() -> None:
    """Gives freed memory back to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _in_this_process(model: str, batch: int, sides: Sequence[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        network = peers.load(model, batch, Path(folder))
        return {side.name: _extra(side.make, network) / 2**20 for side in peers.named(sides)}


def _extra(make: peers.Make, network: peers.Network) -> int:
    with torch.inference_mode():
        side = make(network)
        side()
    return _extra_of_a_call(side)


def _extra_of_a_call(side: Callable[[], object]) -> int:
    """The call is made in a thread of its own: scratch that is kept for each thread is allocated anew, and counts."""
    found: list[int] = []

    def call() -> None:
        with torch.inference_mode():
            release()
            _CLEAR.write_text(_RESET_PEAK)
            before = _status("VmRSS")
            side()
            found.append(_status("VmHWM") - before)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found[0]


def _status(name: str) -> int:
    return int(machine.field(_STATUS, name).split()[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(_in_this_process(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
