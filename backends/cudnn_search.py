"""The fastest of cuDNN's plans for a call, searched in a process of its own: a plan that faults ends a CUDA context.

`python -m ai3_compile.backends.cudnn_search` is that process. It reads requests, a line of JSON each, and answers with
lines of JSON: a plan it is about to try, a plan it has found, and that it is done. A plan is taken only where it
computes what ai3's own `direct` does. What was found is kept on disk.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock

from . import cache, gpu

log = logging.getLogger(__name__)

MOST_PLANS = 40
_FORMAT = 2  # of the plans' texts, which kernels/cudnn/plans.cpp writes
_SECONDS_IDLE = 30.0
_MOST_LEFT_OUT = 8
# Largest difference of a plan's result from direct's, of the largest: sums of positive numbers, which cancel nothing.
_BOUNDS = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float64: 1e-10}
_TF32 = 4e-3
# As on_gpu.Call, with every tensor described by its sizes, strides and dtype.
Call = tuple[str, list[list[Any]]]
_NOTHING = (["value", None], ["value", False], ["value", 0])
_REPORT = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_char_p, ctypes.c_float, ctypes.c_int64)


def folder() -> Path:
    return cache.cache_dir() / "tuning" / "cudnn"


def stored() -> Iterator[tuple[str, str]]:
    """Keys and texts of the plans that were found on this machine; damaged files are passed over, and said."""
    for path in sorted(folder().glob("*.json")):
        found = _read(path)
        if found is not None:
            yield found


def _read(path: Path) -> tuple[str, str] | None:
    try:
        found = json.loads(path.read_text())
        return str(found["key"]), str(found["plan"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("searching again: %s is damaged (%s)", path, error)
        return None


def _path(call: Call, settings: list[int]) -> Path:
    """The same for all devices of a kind: processes that have one each run the same plan."""
    device, *numerics = settings
    machine = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    asked = [gpu.CUT] if numerics[0] else []  # of a plan, besides what is asked of all
    problem = json.dumps([_FORMAT, _essential(call), *machine, numerics, *asked])
    return folder() / f"{hashlib.sha256(problem.encode()).hexdigest()[:32]}.json"


def _essential(call: Call) -> Call:
    """What a plan depends on: calls that differ in the rest run the same one."""
    name, arguments = call
    given = {argument: described for argument, *described in arguments if described not in _NOTHING}
    if any(argument.startswith("bn_") for argument in given):
        # It comes to the plan as a bias.
        (filters, *_), dtype = given["weight"][1], given["weight"][-1]
        given["bias"] = ["like", [filters], [1], dtype]
    left_out = ("algorithm", "static_weight", "bn_weight", "bn_bias", "bn_mean", "bn_var", "bn_eps")
    return name, sorted([argument, *described] for argument, described in given.items() if argument not in left_out)


def search(calls: Iterable[Call], settings: list[int]) -> list[tuple[str, str]]:
    """Keys and texts of the fastest plans for these calls: searched where none is stored.

    `settings` are the device's index, whether TF32 is allowed in convolutions, whether results must be deterministic,
    and the largest workspace in bytes or -1. Of several processes that ask at once one searches, and all get its plans.
    """
    wanted = {_path(call, settings): call for call in calls}
    found: list[tuple[str, str]] = []
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with FileLock(folder() / "search.lock", timeout=cache.timeout()):
            for path, call in wanted.items():
                known = _read(path)
                found.extend(_WORKER.search(call, settings, path) if known is None else [known])
    except OSError as error:  # filelock's Timeout is one
        log.warning("cuDNN's own choice is taken, as plans cannot be searched here: %s", error)
    return found


class _Worker:
    """The process that searches: started when first needed, ended when idle."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None

    def search(self, call: Call, settings: list[int], path: Path) -> list[tuple[str, str]]:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            try:
                return self._search(call, settings, path)
            finally:
                self._timer = threading.Timer(_SECONDS_IDLE, self.stop)
                self._timer.daemon = True
                self._timer.start()

    def _search(self, call: Call, settings: list[int], path: Path) -> list[tuple[str, str]]:
        left_out: list[str] = []
        while len(left_out) < _MOST_LEFT_OUT:
            trying, wrong, is_done = "starting", "", False
            found: list[tuple[str, str]] = []
            for answer in self._answers({"call": call, "settings": settings, "skip": left_out}):
                if "trying" in answer:
                    trying = answer["trying"]
                if "failed" in answer:
                    log.warning("cuDNN's own choice is taken for %s: %s", call[0], answer["failed"])
                if "wrong" in answer:
                    wrong = answer["wrong"]
                    log.warning("the plan %s is left out: %s", wrong, answer["how"])
                if "plan" in answer:
                    _write(path, answer)
                    found.append((answer["key"], answer["plan"]))
                is_done = "done" in answer
            if is_done and not wrong:
                return found
            if is_done:
                left_out.append(wrong)
                continue
            # It ended without an answer: the plan it was trying took it along.
            said = self._said()
            self.stop()
            if trying == "starting":
                log.warning("cuDNN's own choice is taken: the process that searches for plans ended: %s", said)
                return []
            log.warning("the plan %s is left out, as it ended the process that tried it: %s", trying, said)
            left_out.append(trying)
        log.warning("cuDNN's own choice is taken for %s: %d plans were left out", call[0], len(left_out))
        return []

    def _answers(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._process is None or self._process.poll() is not None:
            self._errors = tempfile.TemporaryFile()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return
        for line in self._process.stdout:
            answer = json.loads(line)
            yield answer
            if "done" in answer:
                return

    def _said(self) -> str:
        """The last line that the process wrote of what went wrong."""
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it says nothing"

    def stop(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                self._process = None


_WORKER = _Worker([sys.executable, "-m", __name__])


def _write(path: Path, answer: dict[str, Any]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        json.dump(answer, file, indent=1)
    os.replace(name, path)


def _serve() -> None:
    """Answers requests until there are no more."""
    from .. import core, registry
    from . import abi, cudnn

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    core.load()
    support = cudnn.support()
    auto = registry.find("conv2d", "auto@cudnn")
    original = cudnn.PLATFORM.table(auto)
    epilogue = ctypes.byref(registry.platforms()["cuda"].table(registry.EPILOGUE))  # type: ignore[attr-defined]
    direct = registry.find("conv2d", "direct@cuda")
    registry.platforms()["cuda"].load([direct])
    registry.platforms()["cudnn"].load([auto])
    skip, fastest, plans = b"", "", []

    @_REPORT
    def report(index: int, name: bytes, milliseconds: float, workspace: int) -> None:
        if milliseconds < 0:
            answer(trying=name.decode())
        elif index < 0:
            nonlocal fastest
            fastest = name.decode()
            answer(fastest=fastest, milliseconds=milliseconds, workspace=workspace)

    def run(args: Any) -> None:
        key = cudnn.key_of(args)
        size = 1 << 20
        text = ctypes.create_string_buffer(size)
        found = support.ai3_cudnn_search(args, epilogue, MOST_PLANS, skip, report, text, size)
        if 0 < found <= size:
            plans.append((key, text.value.decode()))
        else:
            answer(failed=cudnn.message())

    # Its plan is searched where the algorithm itself would run one.
    table = abi.Kernel.from_buffer_copy(original)
    keep = type(table.run)(run)
    table.run = keep
    table.fuses = type(table.fuses)()
    searching = registry.Algorithm("conv2d", "search", "cudnn", "", None)
    core.register_kernel(searching.id, ctypes.addressof(table), searching.label, "cuda")
    for line in sys.stdin:
        request = json.loads(line)
        device, *numerics = request["settings"]
        skip = "".join(f"\n{name}\n" for name in request["skip"]).encode()
        torch.cuda.set_device(device)
        core.load().ai3_core_set_numerics(numerics[0], 0, numerics[1], numerics[2])
        name, arguments = request["call"]
        given = {
            argument: _value(argument, *described) for argument, *described in arguments if argument != "algorithm"
        }

        def result_of(algorithm: registry.Algorithm) -> torch.Tensor:
            found = getattr(torch.ops.ai3, name).default(**given, algorithm=algorithm.id)
            torch.cuda.synchronize()
            return given["output"] if found is None else found

        plans.clear()
        try:
            with torch.no_grad():
                expected = result_of(direct).clone()
                result_of(searching)
                for key, plan in plans:
                    support.ai3_cudnn_set_plan(key.encode(), plan.encode())
                    how = fault(result_of(auto), expected, tf32=bool(numerics[0]) and expected.dtype == torch.float32)
                    if how is None:
                        answer(key=key, plan=plan)
                    else:
                        answer(wrong=fastest, how=how)
        except RuntimeError as error:
            answer(failed=str(error))
            if "CUDA error" in str(error) or "illegal" in str(error):
                os._exit(1)  # the context is lost
        answer(done=True)


def fault(found: torch.Tensor, expected: torch.Tensor, tf32: bool) -> str | None:
    """What is wrong with a result, in a few words; both are sums of positive numbers."""
    limit = _TF32 if tf32 else _BOUNDS[expected.dtype]
    found, expected = found.double(), expected.double()
    by = ((found - expected).abs().max() / expected.abs().max()).item()
    if not by <= limit:  # NaN where either holds one
        return f"its result is wrong by {by:g}"
    off = gpu.too_large_by(found, expected)
    if tf32 and abs(off) > gpu.CUT:
        return f"it cuts factors off where TF32 rounds them, and its result is too large by {off:g} as a whole"
    return None


def _value(name: str, kind: str, given: Any, *rest: Any) -> Any:
    if kind == "value":
        return False if name == "static_weight" else given
    strides, dtype = rest
    tensor = torch.empty_strided(given, strides, dtype=getattr(torch, dtype), device="cuda")
    return tensor.uniform_(0.1, 1)  # zeros and NaNs take other times


if __name__ == "__main__":
    _serve()
