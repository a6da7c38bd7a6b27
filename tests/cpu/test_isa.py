"""The kernels as built for lesser CPUs: the tests of one case of each kind, in a process that sees such a one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ai3_compile.backends import builder

ROOT = Path(__file__).resolve().parents[2]
CASES = "above-columns or batch-3 or stem or asymmetric-padding or dilation or groups"
CASES += " or depthwise or linear or pool"
WIDER = {"avx2": ("avx512",), "default": ("avx512", "avx2")}


@pytest.mark.parametrize("capability", WIDER)
def test_kernels(capability):
    if builder.cpu_isa() not in WIDER[capability]:
        pytest.skip(f"this CPU is no wider than {capability}: the other tests are these")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/cpu/test_kernels.py", "-k", CASES],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
