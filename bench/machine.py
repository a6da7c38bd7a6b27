"""The machine and the versions of a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import ai3_compile
from ai3_compile.backends import builder

_STAT = Path("/proc/stat")
PACKAGES = ("torch", "torchvision", "onnxruntime", "openvino", "onnx")


def describe() -> dict[str, object]:
    return {
        "cpu": _cpuinfo("model name") or platform.processor(),
        "vendor": vendor(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory GiB": round(_meminfo("MemTotal") / 2**30, 1),
        "isa": builder.cpu_isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"ai3_compile": ai3_compile.__version__, **{name: version(name) for name in PACKAGES}},
        "compiler": builder.describe_compiler(),
        "revision": _revision(),
    }


def version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def vendor() -> str:
    return _cpuinfo("vendor_id") or "unknown"


def available_memory() -> int:
    """Bytes that can be allocated without swapping; 0 where the system does not say."""
    return _meminfo("MemAvailable")


class Disturbance:
    """What else ran on the cores from now on: all that was measured beside it is to be doubted."""

    def __init__(self) -> None:
        self._before = self._now()

    def shares(self) -> dict[str, float] | None:
        """Shares of the cores' time: of other processes, and of other machines on the same host; None if unknown.

        Children that still run, such as Inductor's compile workers, count among the others.
        """
        now = self._now()
        if now is None or self._before is None:
            return None
        wall, busy, stolen, own = (after - before for after, before in zip(now, self._before))
        if wall == 0:
            return None  # less than the kernel's clock tells
        cores = wall * (os.cpu_count() or 1)
        return {"other processes": round(max(0.0, busy - own) / cores, 4), "other machines": round(stolen / cores, 4)}

    @staticmethod
    def _now() -> tuple[float, float, float, float] | None:
        """Seconds: passed, busy of all processes, stolen, busy of this process and of its children."""
        if not _STAT.exists():
            return None
        ticks = [int(count) for count in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = ticks
        second, times = os.sysconf("SC_CLK_TCK"), os.times()
        busy = (user + nice + system + interrupts + soft_interrupts) / second
        return times.elapsed, busy, stolen / second, sum(times[:4])


def _cpuinfo(name: str) -> str:
    return field(Path("/proc/cpuinfo"), name)


def _meminfo(name: str) -> int:
    text = field(Path("/proc/meminfo"), name)
    return int(text.split()[0]) * 1024 if text else 0


def field(file: Path, name: str) -> str:
    """The first value of a field in a file of `field : value` lines; empty without the file or the field."""
    lines = file.read_text().splitlines() if file.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name]
    return found[0] if found else ""


def _revision() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "not a checkout"
