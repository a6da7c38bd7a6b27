"""compute-sanitizer over ai3's own kernels on an NVIDIA GPU: `python -m tests.sanitize TOOL [arguments of pytest]`.

Every case of their operations, every tile of the implicit GEMM, and attention. What PyTorch and cuDNN compute as
references is not instrumented: their names are C++'s, ai3's are plain. Several processes (`-n 9`) are for memcheck:
racecheck itself ended at thirteen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TESTS = ("tests/cuda/test_tiles.py", "tests/cuda/test_kernels.py", "tests/cuda/test_attention.py")
ONLY = "not cudnn and not cublas and not swin and not encoder"
FOUND = 86


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] not in TOOLS:
        raise SystemExit(f"{__doc__}\nTOOL is one of {', '.join(TOOLS)}.")
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ["PATH"], "/usr/local/cuda/bin")))
    if sanitizer is None:
        raise SystemExit("There is no compute-sanitizer in PATH: it comes with NVIDIA's CUDA toolkit.")
    command = [sanitizer, "--tool", arguments[0], "--target-processes", "all", "--require-cuda-init", "no"]
    command += ["--kernel-name-exclude", "kns=_Z", "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "pytest", *TESTS, "-k", ONLY, *arguments[1:]]
    # A read that leaves its buffer would stay within the allocator's blocks.
    return subprocess.run(command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
