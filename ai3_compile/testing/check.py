"""Proves an algorithm on every case of its operation: against float64, between guards, in all layouts of PyTorch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .. import core, registry
from ..backends import abi, gpu
from ..errors import AlgorithmCheckError, AlgorithmError, KernelMemoryError
from ..ops import OPERATIONS, activations
from . import harness, references
from .calls import CHANNELS_LAST, IMAGES, Call, all_calls, require_cases

_WIDTH = 118
_SHOWN = 12
# Channels before and behind the output, of odd numbers: nothing about it is aligned then.
BESIDE = (3, 5)
Verdict = Literal["right", "refused", "wrong"]
RIGHT: Literal["right"] = "right"
REFUSED: Literal["refused"] = "refused"
WRONG: Literal["wrong"] = "wrong"


@dataclass(frozen=True)
class CheckRow:
    """What came of one case."""

    case: str
    variant: str
    """What is added to the operation, or the layout of its input; empty for neither."""
    dtype: str
    verdict: Verdict
    error: float | None
    """||y - ref|| / ||ref|| against float64; None where nothing came out."""
    detail: str
    """Why it was refused, or what is wrong."""
    properties: tuple[str, ...]

    def __str__(self) -> str:
        name = f"{self.case} {self.dtype}" + (f" ({self.variant})" if self.variant else "")
        if self.verdict == RIGHT:
            return f"{name}: right, relative error {self.error:.1e}"
        return f"{name}: {self.verdict}: {self.detail}"


@dataclass(frozen=True)
class DomainRow:
    """How the cases with one property came out."""

    property: str
    right: int
    refused: int
    wrong: int


@dataclass(frozen=True)
class CheckReport:
    """What `check_algorithm` found, a row for each case."""

    operation: str
    name: str
    rows: tuple[CheckRow, ...]

    def of(self, verdict: str) -> tuple[CheckRow, ...]:
        return tuple(row for row in self.rows if row.verdict == verdict)

    @property
    def passed(self) -> bool:
        """Whether it is right on every case that it takes, and takes one at least."""
        return not self.of(WRONG) and bool(self.of(RIGHT))

    @property
    def domain(self) -> tuple[DomainRow, ...]:
        """For each property, how many of the cases that have it are right, refused and wrong."""
        counts: dict[str, dict[str, int]] = {}
        for row in self.rows:
            for name in ("every case", *row.properties):
                counts.setdefault(name, {RIGHT: 0, REFUSED: 0, WRONG: 0})[row.verdict] += 1
        return tuple(DomainRow(name, **found) for name, found in counts.items())

    def __str__(self) -> str:
        verdict = "right on every case it takes" if self.passed else "not right"
        domain = self.domain
        width = max(len(row.property) for row in domain)
        lines = [f"{self.operation} {self.name!r}: {verdict}", ""]
        lines.append(f"{'cases with':{width}}  {'right':>7} {'refused':>7} {'wrong':>7}")
        for row in domain:
            numbers = " ".join(f"{n or '-':>7}" for n in (row.right, row.refused, row.wrong))
            lines.append(f"{row.property:{width}}  {numbers}")
        for dtype in ("float32", "float64", "float16", "bfloat16"):
            errors = [row.error for row in self.of(RIGHT) if row.dtype == dtype and row.error is not None]
            if errors:
                lines.append(f"largest relative error in {dtype}: {max(errors):.1e}")
        reasons: dict[str, list[str]] = {}
        for found in self.of(REFUSED):
            reasons.setdefault(found.detail, []).append(found.case)
        for reason, names in reasons.items():
            text = f"refused, {reason}: {', '.join(dict.fromkeys(names))}"
            lines.extend(textwrap.wrap(text, _WIDTH, subsequent_indent="    "))
        return "\n".join(lines)


def check_algorithm(operation: str, name: str, *, rtol: float | None = None) -> CheckReport:
    """Runs an algorithm, `mine` or `mine@cpp`, on every case of its operation, and compares with float64.

    One in C++ runs through the C ABI alone, with guard bytes around every buffer and an output full of NaN, and with
    a pooling behind it where it takes one in; then, like
    all others, as the operation that compiled graphs call. ||y - ref|| / ||ref|| may be 1e-6 in float32 (5e-6 for
    Winograd; what a plain loop errs by in long sums) and 1e-13 in float64, and 0 where numbers are only moved or
    compared: references.py says why. `rtol` is another bound for float32, for an algorithm whose numerics are not those
    of a sum of products. One for GPUs runs there, in strict float32, and in float16 and bfloat16 too.

    Raises AlgorithmCheckError where it is wrong on one case or refuses all of them, UnknownAlgorithmError and
    UnknownOperationError for the names, UnsupportedCallableError for attention, which has no cases, BuildError where
    its source does not compile.
    """
    algorithm = registry.find(operation, name)
    require_cases(operation)
    if (reason := registry.system().platforms[algorithm.platform]) is not None:
        raise AlgorithmError(label=algorithm.label, message=f"it cannot run here: {reason}")
    core.load()
    with gpu.precision(tf32=False):
        if algorithm.device == "cuda":
            core.follow_numerics()
        report = CheckReport(operation, algorithm.qualified, tuple(_rows(algorithm, rtol)))
    if report.passed:
        return report
    wrong = [str(row) for row in report.of(WRONG)]
    shown = wrong[:_SHOWN] if wrong else ["It refuses every case: there is nothing it could be right on."]
    if len(wrong) > _SHOWN:
        shown.append(f"... and {len(wrong) - _SHOWN} more")
    raise AlgorithmCheckError(operation=operation, name=algorithm.qualified, failures="\n".join(shown), report=report)


def _rows(algorithm: registry.Algorithm, rtol: float | None) -> Iterator[CheckRow]:
    is_native = algorithm.platform not in ("torch", "python")
    table = harness.table_of(algorithm) if is_native else None
    safe = True
    for call in all_calls(algorithm.operation, algorithm.device or "cpu"):
        limit = references.bound(algorithm.operation, algorithm.name, call.spec.dtype, call.terms)
        if rtol is not None and call.spec.dtype == torch.float32:
            limit = rtol
        dtype = str(call.spec.dtype).removeprefix("torch.")
        described = (call.spec.name, call.variant, dtype)
        if safe or not call.is_layout:
            outcome = check_call(algorithm, table, call, limit)
        else:
            # Nothing guards memory there: what writes outside its buffers may take this process down.
            outcome = Outcome(WRONG, None, "not run, since it is wrong about memory in the cases before")
        safe = safe and not outcome.is_memory
        yield CheckRow(*described, outcome.verdict, outcome.error, outcome.detail, tuple(call.properties()))


@dataclass(frozen=True)
class Outcome:
    """What came of one call."""

    verdict: Verdict
    error: float | None = None
    detail: str = ""
    is_memory: bool = False
    """Whether it wrote where it must not, or not where it must."""


def check_call(algorithm: registry.Algorithm, table: abi.Kernel | None, call: Call, limit: float) -> Outcome:
    """Runs one call by every way there is to it; `table` is that of an algorithm in C++."""
    worst = 0.0
    try:
        reason = algorithm.supports(call.spec)
        if reason is not None:
            return Outcome(REFUSED, detail=reason)
        expected = call.compute(torch.float64)
        # The guarded way comes first, so that no other runs where it fails.
        for found, pooled in _results(algorithm, table, call):
            error, what = references.judge(found, F.max_pool2d(expected, 2) if pooled else expected, limit)
            if what is not None:
                return Outcome(WRONG, error, what)
            worst = max(worst, error)
    except KernelMemoryError as fault:
        return Outcome(WRONG, detail=str(fault), is_memory=True)
    except Exception as failure:  # the user's own code: whatever it raises is what is wrong with it
        said = str(failure) if isinstance(failure, RuntimeError) else f"{type(failure).__name__}: {failure}"
        return Outcome(WRONG, detail=f"failed: {said.splitlines()[0] if said else type(failure).__name__}")
    return Outcome(RIGHT, worst)


def _results(
    algorithm: registry.Algorithm, table: abi.Kernel | None, call: Call
) -> Iterator[tuple[torch.Tensor, bool]]:
    """The results, and whether the largest of each 2x2 pixels is what a result is of."""
    if table is not None and not call.is_layout:
        for found in through_abi(table, call):
            yield found, False
        if (pooled := pooled_through_abi(table, call)) is not None:
            yield pooled, True
    before = [None if t is None else t.nan_to_num() for t in call.tensors]
    with _unwritten_is_nan():
        yield through_torch(algorithm, call), False
    for name, old, new in zip(("input", "weight", "bias", "residual"), before, call.tensors):
        if old is not None and new is not None and not torch.equal(old, new.nan_to_num()):
            raise KernelMemoryError(buffer=name, what="written, and it is an input")


def through_abi(table: abi.Kernel, call: Call) -> Iterator[torch.Tensor]:
    """The result between guards, in each layout that the algorithm takes, and if it can within a larger image and over
    its residual."""
    both = abi.NCHW | abi.NHWC
    layouts = (abi.NHWC, abi.NCHW) if table.flags & both == both else (table.flags,)
    number = activations.NUMBERS[call.activation]
    fuses = harness.fuses(table, call.spec, call.residual is not None, number)
    fused = (call.residual, number) if fuses else (None, 0)
    for layout in layouts:
        out = harness.run_kernel(table, call.spec, call.input, call.weight, call.bias, *fused, layout)
        if not fuses:
            out = out if call.residual is None else out + call.residual
            out = activations.ACTIVATIONS[call.activation](out)
        yield out
    if not fuses and (call.residual is not None or number):
        return
    if table.flags & abi.STRIDED_OUTPUT and call.residual is None:
        yield harness.run_kernel(table, call.spec, call.input, call.weight, call.bias, None, fused[1], abi.NHWC, BESIDE)
    if table.flags & abi.STRIDED_INPUT:
        yield harness.run_kernel(table, call.spec, call.input, call.weight, call.bias, *fused, abi.NHWC, within=BESIDE)
    if table.flags & abi.RESIDUAL_IN_PLACE and call.residual is not None:
        yield harness.run_kernel(
            table, call.spec, call.input, call.weight, call.bias, *fused, layout=abi.NHWC, in_place=True
        )


def pooled_through_abi(table: abi.Kernel, call: Call) -> torch.Tensor | None:
    """The largest of each 2x2 pixels, between guards; None where the algorithm leaves them to another."""
    number = activations.NUMBERS[call.activation]
    if call.residual is not None or not harness.pools(table, call.spec, number):
        return None
    return harness.run_kernel(
        table, call.spec, call.input, call.weight, call.bias, activation=number, layout=abi.NHWC, pools=True
    )


def through_torch(algorithm: registry.Algorithm, call: Call, static_weight: bool = False) -> torch.Tensor:
    """The result of the PyTorch operation that a compiled graph calls."""
    if algorithm.platform == "torch":
        return call.compute()
    operation = OPERATIONS[algorithm.operation]
    args, named = operation.arguments(call.input, call.weight, call.bias, call.attributes, algorithm.id, static_weight)
    if call.variant == CHANNELS_LAST and algorithm.operation in IMAGES:
        named["channels_last"] = True
    if call.residual is not None:
        named |= {"residual": call.residual, "activation": activations.NUMBERS[call.activation]}
    return operation.overload_for(algorithm)(*args, **named)


@contextmanager
def _unwritten_is_nan() -> Iterator[None]:
    """PyTorch fills the memory of new tensors with NaN, so that what is left unwritten shows."""
    deterministic: Any = torch.utils.deterministic  # its module is of a class without stubs
    filled = deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled
