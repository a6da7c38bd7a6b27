"""The machine and the versions of a measurement."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import ai3_compile
from ai3_compile.backends import builder


def describe() -> dict[str, object]:
    return {
        "cpu": _cpu(),
        "isa": builder.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ai3_compile": ai3_compile.__version__,
        "compiler": builder.describe_compiler(),
        "revision": _revision(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def _revision() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "not a checkout"
