"""Algorithms of users' own on GPUs, tried in a process of their own before this one runs them: what faults there ends
that process's CUDA context, and not this one's. What has come through is remembered on disk.

`python -m ai3_compile.trial FILE` is that process; FILE holds the algorithm.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .backends import cache, gpu
from .errors import AlgorithmError
from .registry import Algorithm

# Set in that process, which tries nothing itself.
TRYING = "AI3_TRYING"
_SECONDS = 300.0
_COMMAND = (sys.executable, "-m", __name__)


def folder() -> Path:
    return cache.cache_dir() / "trials"


def ensure(algorithm: Algorithm, command: Sequence[str] = _COMMAND) -> None:
    """Tries the algorithm where it has not been yet. Raises AlgorithmError where it takes its process along."""
    if os.environ.get(TRYING):
        return
    key = hashlib.sha256(repr((algorithm.label, algorithm.version, gpu.identity())).encode()).hexdigest()[:32]
    path = folder() / f"{key}.json"
    if path.exists():
        return
    # A function of the user's cannot be handed over; without it more is tried, not less.
    given = base64.b64encode(pickle.dumps(replace(algorithm, user_supports=None))).decode()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "algorithm"
        file.write_text(given)
        try:
            done = subprocess.run(
                [*command, str(file)],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                env={**os.environ, TRYING: "1"},
            )
        except subprocess.TimeoutExpired:
            raise AlgorithmError(
                label=algorithm.label, message=f"tried in a process of its own, it had not ended after {_SECONDS:g} s"
            ) from None
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise AlgorithmError(
            label=algorithm.label,
            message=f"it ended the process that tried it: {said}\nA kernel that reads or writes where it must not does "
            "that; compute-sanitizer, of the CUDA toolkit, says where.",
        )
    folder().mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"algorithm": algorithm.label, "version": algorithm.version}) + "\n")


def _try(file: Path) -> None:
    """Runs what the algorithm takes of its operation's cases. Wrong numbers are not what this looks for."""
    from . import core, registry
    from .testing import calls, harness

    algorithm = pickle.loads(base64.b64decode(file.read_text()))
    registry.add(algorithm)
    core.load()
    table = harness.table_of(algorithm)
    for variant in (calls.PLAIN, calls.EPILOGUE) if algorithm.operation in ("conv2d", "linear") else (calls.PLAIN,):
        for plain in calls.plain_calls(algorithm.operation, torch.float32, variant):
            call = calls.in_dtype(plain, torch.float32, "cuda")
            if algorithm.supports(call.spec) is not None:
                continue
            number = calls.activations.NUMBERS[call.activation]
            if not harness.fuses(table, call.spec, call.residual is not None, number):
                call, number = replace(call, residual=None), 0
            try:
                harness.run_kernel(table, call.spec, call.input, call.weight, call.bias, call.residual, number)
            except (harness.KernelMemoryError, RuntimeError) as error:
                print(f"{call.spec.name}: {error}", file=sys.stderr)
                torch.cuda.synchronize()  # raises where the context is lost


if __name__ == "__main__":
    _try(Path(sys.argv[1]))
