"""compute-sanitizer over ai3's own kernels on an NVIDIA GPU: `python -m tests.sanitize TOOL [arguments of pytest]`.

Every case of their operations, every tile of the implicit GEMM, and attention, after an error that is there
(planted.cu) has been found. What PyTorch and cuDNN compute as references is not instrumented: their names are C++'s,
ai3's are plain. Several processes (`-n 9`) are for memcheck: racecheck itself ended at thirteen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import ai3_compile as ai3
from ai3_compile import trial

TOOLS = ("memcheck", "racecheck")
TESTS = ("tests/cuda/test_tiles.py", "tests/cuda/test_kernels.py", "tests/cuda/test_attention.py")
ONLY = "not cudnn and not cublas and not swin and not encoder"
FOUND = 86
PLANTED = "planted"


def main(arguments: Sequence[str]) -> int:
    if list(arguments) == [PLANTED]:
        return run_the_planted_error()
    if not arguments or arguments[0] not in TOOLS:
        raise SystemExit(f"{__doc__}\nTOOL is one of {', '.join(TOOLS)}.")
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ["PATH"], "/usr/local/cuda/bin")))
    if sanitizer is None:
        raise SystemExit("There is no compute-sanitizer in PATH: it comes with NVIDIA's CUDA toolkit.")
    command = [sanitizer, "--tool", arguments[0], "--target-processes", "all", "--require-cuda-init", "no"]
    command += ["--kernel-name-exclude", "kns=_Z", "--error-exitcode", str(FOUND), sys.executable, "-m"]
    # A read that leaves its buffer would stay within the allocator's blocks.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    planted = subprocess.run(
        [*command, __spec__.name, PLANTED], env={**environment, trial.TRYING: "1"}, capture_output=True, text=True
    )
    if planted.returncode != FOUND:
        raise SystemExit(f"{arguments[0]} does not find the error of planted.cu:\n{planted.stdout}{planted.stderr}")
    return subprocess.run([*command, "pytest", *TESTS, "-k", ONLY, *arguments[1:]], env=environment).returncode


def run_the_planted_error() -> int:
    ai3.register_algorithm("relu", PLANTED, Path(__file__).with_name("planted.cu"))
    model = torch.nn.Sequential(torch.nn.ReLU())
    ai3.swap_operation("relu", model, PLANTED)
    model(torch.ones(33, device="cuda"))
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
