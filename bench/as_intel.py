"""The same measurement with MKL told to treat the CPU as Intel's: on others it takes slower paths of its own accord."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import machine

_IS_CHILD = "AI3_BENCH_AS_INTEL"
_ANSWER = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def absent() -> str | None:
    """None where there is something to measure, else the reason."""
    if _IS_CHILD in os.environ:
        return "this is the run in which MKL treats the CPU as Intel's"
    if machine.vendor() != "AuthenticAMD":
        return f"only for AMD's CPUs; this one is of {machine.vendor()}"
    return None if torch.backends.mkl.is_available() else "this PyTorch has no MKL"


def measure(arguments: Sequence[str]) -> dict[str, Any]:
    """The result of `python -m bench` with these arguments, in a process whose MKL takes the CPU for Intel's.

    Raises CalledProcessError where the compiler or the bench fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, library, out = (Path(folder) / name for name in ("answer.c", "answer.so", "result.json"))
        source.write_text(_ANSWER)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), _IS_CHILD: "1"}
        # Of two --out the last one counts.
        command = [sys.executable, "-m", "bench", *arguments, "--out", str(out)]
        subprocess.run(
            command, env=environment, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL, check=True
        )
        result: dict[str, Any] = json.loads(out.read_text())
        return result
