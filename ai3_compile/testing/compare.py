"""Algorithms of one operation side by side on shapes of the user's: time, error, memory, and why one is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import core, gpu_timing, registry
from ..backends import gpu, native
from ..errors import OptionValueError
from ..selection import Use
from . import references
from .calls import CHANNELS_LAST, IMAGES, Call, in_dtype, require_cases
from .check import through_torch
from .shapes import Shape, calls_of

_WARM_UP = 3


@dataclass(frozen=True)
class CompareRow:
    """One algorithm on one shape; what was not measured is None."""

    shape: str
    algorithm: str
    refused: str | None = None
    """Why it cannot run on this shape here."""
    layout: str | None = None
    """Of its input and output: what the algorithm works on without converting."""
    milliseconds: float | None = None
    """Median of all rounds."""
    ratio: float | None = None
    """Its time over that of torch, in the layout that is faster for torch."""
    gflops: float | None = None
    """As if computed directly, 2 operations a product, whatever the algorithm does; None without products."""
    relative_error: float | None = None
    """||y - ref|| / ||ref|| against float64."""
    workspace_bytes: int | None = None
    """Scratch for one call; None where it is not known."""
    packed_bytes: int | None = None
    """Weights kept in another form; None where it is not known."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured: a row for each shape and algorithm."""

    operation: str
    dtype: str
    rounds: int
    threads: int
    torch_version: str
    rows: tuple[CompareRow, ...]
    gpu: str | None = None
    """Which it ran on; None for the CPU."""

    @property
    def title(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.operation}, {self.dtype}, {self.gpu or threads}, median of {self.rounds}"

    def __str__(self) -> str:
        lines = [f"{self.title}; ratio: to torch's time"]
        width = max(len(row.algorithm) for row in self.rows)
        for shape in dict.fromkeys(row.shape for row in self.rows):
            lines.append(f"\n{shape}")
            header = f"{'ms':>10} {'ratio':>7} {'GFLOP/s':>8} {'error':>8} {'workspace':>10} {'packed':>10}  layout"
            lines.append(f"  {'':{width}} {header}")
            for row in self.rows:
                if row.shape == shape:
                    lines.append(f"  {row.algorithm:{width}} {_cells(row)}")
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    def plot(self, path: str | Path) -> None:
        """Draws the ratios to torch as bars, grouped by shape, into a file whose ending says its format.

        Raises MissingPackageError where matplotlib is not installed.
        """
        from .plot import draw

        draw(self, Path(path))


def compare(
    operation: str,
    shapes: Iterable[Shape],
    algorithms: Sequence[str] | None = None,
    *,
    rounds: int = 20,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Comparison:
    """Measures an operation's algorithms, all or the named ones, and torch, in turn in this process.

    A shape is a tuple or a dict: `((1, 64, 56, 56), (64, 64, 3, 3))` or `{"input": (1, 64, 56, 56), "weight":
    (64, 64, 3, 3), "stride": 2, "padding": 1}` for conv2d; a wrong one is answered with an example for its operation.
    Weights count as constants, as in inference: what an algorithm makes of them once is not in its time. Images are in
    the layout that each algorithm prefers; for torch both are measured, and the faster one is its time. With the device
    `cuda` they are timed as CUDA graphs, without the CPU's share, in the precision that PyTorch's settings say.

    Raises UnknownOperationError, UnknownAlgorithmError, OptionValueError, ShapeError or, for attention,
    UnsupportedCallableError for what cannot be measured, and BuildError for sources that do not compile.
    """
    registry.check_operation(operation)
    require_cases(operation)
    if not isinstance(rounds, int) or rounds < 1:
        raise OptionValueError(name="rounds", expected="a number of 1 or more", found=repr(rounds))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise OptionValueError(name="dtype", expected="a floating point torch.dtype", found=repr(dtype))
    if device not in ("cpu", "cuda") or (device == "cuda" and gpu.unavailable() is not None):
        raise OptionValueError(name="device", expected="'cpu', or 'cuda' where there is one", found=repr(device))
    names = [algorithms] if isinstance(algorithms, str) else algorithms
    there = registry.for_device(operation, device)
    named = there if names is None else [_named(operation, name, there) for name in names]
    others = [a for a in dict.fromkeys(named) if a.platform != "torch"]
    calls = calls_of(operation, shapes, dtype)
    core.load()
    if device == "cuda":
        calls = [in_dtype(call, dtype, device) for call in calls]
        core.follow_numerics()
    rows: list[CompareRow] = []
    with torch.inference_mode():
        for call in calls:
            rows.extend(_measure(call, others, rounds))
    name = str(dtype).removeprefix("torch.")
    threads, where = torch.get_num_threads(), torch.cuda.get_device_name() if device == "cuda" else None
    return Comparison(operation, name, rounds, threads, torch.__version__, tuple(rows), where)


def _named(operation: str, name: str, there: Sequence[registry.Algorithm]) -> registry.Algorithm:
    """The algorithm of this name; among those that share it one of the device."""
    return next((a for a in there if name in (a.name, a.qualified)), None) or registry.find(operation, name)


def _measure(call: Call, algorithms: Sequence[registry.Algorithm], rounds: int) -> list[CompareRow]:
    """The rows of one shape, torch's first."""
    operation = call.spec.operation
    # Weights made in inference mode have no version counter, and would be packed at every call.
    with torch.inference_mode(False), torch.no_grad():
        last = _channels_last(call) if operation in IMAGES else None
    sides: dict[str, Callable[[], torch.Tensor]] = {"torch": call.compute}
    if last is not None:
        sides[f"torch {CHANNELS_LAST}"] = last.compute
    refused: dict[str, str] = {}
    layouts: dict[str, str] = {}
    for algorithm in algorithms:
        source, name = call, algorithm.qualified
        refusal = _refusal(algorithm, call)
        if refusal is None:
            if last is not None:
                registry.platforms()[algorithm.platform].search([algorithm], call.spec, Use(in_graph=True))
                prefers = registry.platforms()[algorithm.platform].prefers_channels_last(algorithm)
                source, layouts[name] = (last, CHANNELS_LAST) if prefers else (call, "contiguous")
            refusal = _failure(algorithm, source)
        if refusal is not None:
            refused[name] = refusal
        else:
            sides[name] = functools.partial(through_torch, algorithm, source, static_weight=True)

    expected = call.compute(torch.float64)
    errors = {name: references.relative_error(side(), expected) for name, side in sides.items()}
    times = gpu_timing.seconds(sides, rounds) if call.input.is_cuda else _medians(sides, rounds)
    fastest = min((name for name in times if name.split()[0] == "torch"), key=times.__getitem__)
    if operation in IMAGES:
        layouts["torch"] = "contiguous" if fastest == "torch" else CHANNELS_LAST
    times["torch"], errors["torch"] = times[fastest], errors[fastest]
    products = 0 if call.weight is None else 2 * expected.numel() * call.terms
    rows = [_row(call, "torch", layouts, times, errors, products, (None, None))]
    for algorithm in algorithms:
        name = algorithm.qualified
        if name in refused:
            rows.append(CompareRow(call.spec.name, name, refused=refused[name]))
        else:
            rows.append(_row(call, name, layouts, times, errors, products, _memory(algorithm, call)))
    return rows


def _row(
    call: Call,
    name: str,
    layouts: dict[str, str],
    times: dict[str, float],
    errors: dict[str, float],
    products: int,
    memory: tuple[int | None, int | None],
) -> CompareRow:
    return CompareRow(
        shape=call.spec.name,
        algorithm=name,
        layout=layouts.get(name),
        milliseconds=times[name] * 1e3,
        ratio=times[name] / times["torch"],
        gflops=products / times[name] / 1e9 if products else None,
        relative_error=errors[name],
        workspace_bytes=memory[0],
        packed_bytes=memory[1],
    )


def _refusal(algorithm: registry.Algorithm, call: Call) -> str | None:
    unavailable = registry.platforms()[algorithm.platform].unavailable()
    return algorithm.supports(call.spec) if unavailable is None else unavailable


def _failure(algorithm: registry.Algorithm, call: Call) -> str | None:
    """What goes wrong with a first call; None where nothing does."""
    try:
        through_torch(algorithm, call, static_weight=True)
    except RuntimeError as error:  # ai3's own errors, and those of the core library
        return f"failed: {str(error).splitlines()[0]}"
    return None


def _channels_last(call: Call) -> Call:
    input, weight = call.input, call.weight
    input = input.contiguous(memory_format=torch.channels_last)
    weight = None if weight is None else weight.contiguous(memory_format=torch.channels_last)
    return dataclasses.replace(call, input=input, weight=weight, variant=CHANNELS_LAST)


def _memory(algorithm: registry.Algorithm, call: Call) -> tuple[int | None, int | None]:
    """(workspace, packed weights) in bytes, of what says it."""
    platform = registry.platforms()[algorithm.platform]
    if not isinstance(platform, native.NativePlatform):
        return None, None
    table, args = platform.table(algorithm), platform.args(algorithm, call.spec)
    workspace = table.workspace_bytes(args) if table.workspace_bytes else 0
    return workspace, table.packed_bytes(args) if table.packed_bytes else 0


def _medians(sides: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, called in turn so that a drift of the machine meets them all."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        for _ in range(_WARM_UP):
            side()
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def _cells(row: CompareRow) -> str:
    if row.refused is not None:
        return f"refused: {row.refused}"
    gflops = "-" if row.gflops is None else f"{row.gflops:.1f}"
    time_cells = f"{row.milliseconds:10.3f} {row.ratio:7.2f} {gflops:>8}"
    memory_cells = f"{_bytes(row.workspace_bytes):>10} {_bytes(row.packed_bytes):>10}"
    return f"{time_cells} {row.relative_error:8.1e} {memory_cells}  {row.layout or ''}".rstrip()


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
