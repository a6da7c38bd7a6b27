"""Whole networks on a GPU: ai3 against eager, cudnn.benchmark, channels_last and Inductor, by precision and batch."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

import ai3_compile as ai3
from ai3_compile import zoo

from . import gpu, timing
from .table import Table, number

BATCHES = (1, 10, 64)
PRECISIONS = ("fp32", "tf32", "fp16")
DEFAULT, AUTO, CONVERTED = "ai3", "ai3 auto", "ai3.convert"
OURS = (DEFAULT, AUTO, CONVERTED)
RATIOS = {"ratio": DEFAULT, "ratio auto": AUTO, "ratio converted": CONVERTED}
_AUTOTUNED = "max-autotune"
AUTO_OPTIONS = {"conv2d": "auto", "linear": "auto"}


@dataclasses.dataclass(frozen=True)
class Side:
    """What is timed: a network on an image, which lies where it always reads it."""

    run: Callable[[], Any]
    image: torch.Tensor

    def __call__(self) -> Any:
        return self.run()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="on a GPU")
    parser.add_argument(
        "--autotune-limit", type=float, default=0, help="seconds that Inductor's max-autotune may take; 0: left out"
    )


def describe(given: argparse.Namespace) -> dict[str, object]:
    return {
        **gpu.describe(),
        "device": "cuda",
        "models": list(given.models),
        "batches": list(given.batch or BATCHES),
        "precisions": list(given.precision),
        "sides": {
            "eager": "inference_mode",
            "cudnn.benchmark": "eager, torch.backends.cudnn.benchmark",
            "channels_last": "the same, model and input in channels_last",
            "reduce-overhead": "torch.compile(mode='reduce-overhead'), channels_last, cudnn.benchmark",
            _AUTOTUNED: f"torch.compile(mode='max-autotune'), channels_last, within {given.autotune_limit:g} s",
            DEFAULT: "torch.compile(backend='ai3', options={'mode': 'reduce-overhead'}), channels_last",
            AUTO: f"the same with {AUTO_OPTIONS}",
            CONVERTED: f"ai3.convert(model, {AUTO_OPTIONS}), channels_last: without CUDA graphs",
        },
        "relative error": "max|y - reference| / max|reference| on another image than what was compiled and captured "
        "with, the reference being eager in float64",
        "milliseconds": "median over rounds of the time a call, of calls that take 10 ms or more, behind one another "
        "and behind one that is not counted",
    }


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each precision, batch and network."""
    for precision in given.precision:
        for batch in given.batch or BATCHES:
            for name in given.models:
                print(f"{name}, batch {batch}, {precision}", file=sys.stderr, flush=True)
                _set_precision(precision)
                yield _row(name, batch, precision, given)
                _free()


def _set_precision(precision: str) -> None:
    """Through the older of PyTorch's two settings, which sets the newer too: Inductor's max-autotune asks for both."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def _row(name: str, batch: int, precision: str, given: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.float16 if precision == "fp16" else torch.float32
    network = zoo.load_model(f"torchvision:{name}")
    if name.startswith("vit"):
        torch.nn.init.normal_(network.heads.head.weight)  # type: ignore[union-attr,arg-type]  # zero, and so every output
    network = network.cuda()
    image, other = torch.randn(2, batch, *zoo.default_shape(name)[1:], device="cuda", dtype=dtype)
    _settle(network, image.float())
    network = network.to(dtype)
    with torch.inference_mode():
        expected = copy.deepcopy(network).double()(other.double())
    sides: dict[str, Side] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    first: dict[str, float] = {}
    for side, make in _makers(given, name, batch, precision).items():
        if side in given.without:
            failed[side] = "left out by --without"
            continue
        start = time.perf_counter()
        try:
            made = make(network, image.clone())
            for _ in range(3):  # the second call of a CUDA graph captures it
                made()
                torch.cuda.synchronize()
                first.setdefault(side, time.perf_counter() - start)
            made.image.copy_(other)
            errors[side] = _relative_error(made(), expected)
            sides[side] = made
        except Exception as error:  # another library's: whatever it raises is shown, and the others are measured
            failed[side] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            print(f"  {side} {failed[side]}", file=sys.stderr, flush=True)
    times = {side: seconds * 1e3 for side, seconds in gpu.medians(sides, given.rounds).items()}
    return {
        "model": name,
        "batch": batch,
        "precision": precision,
        "milliseconds": times,
        "not measured": failed,
        "seconds to the first call": first,
        **ratios(times),
        "relative error": errors,
        "algorithms": _algorithms(),
    }


def _settle(network: torch.nn.Module, image: torch.Tensor) -> None:
    """Gives batch norms the statistics of their inputs, as training does: else those of deep networks with random
    weights overflow float16, or leave nothing to compare."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the mean of all batches: of one
    network.train()
    with torch.no_grad():
        network(image if len(image) > 1 else torch.randn_like(image.expand(4, -1, -1, -1)))
    network.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def _algorithms() -> dict[str, int]:
    """How often each algorithm was chosen, by `auto` in the network that was compiled last with it."""
    counted: dict[str, int] = {}
    with contextlib.suppress(LookupError):  # it failed
        for row in ai3.last_report():
            key = f"{row.operation} {row.algorithm}"
            counted[key] = counted.get(key, 0) + 1
    return counted


def _makers(
    given: argparse.Namespace, name: str, batch: int, precision: str
) -> dict[str, Callable[[torch.nn.Module, torch.Tensor], Side]]:
    found: dict[str, Callable[[torch.nn.Module, torch.Tensor], Side]] = {
        "eager": functools.partial(_eager, benchmark=False, channels_last=False),
        "cudnn.benchmark": functools.partial(_eager, benchmark=True, channels_last=False),
        "channels_last": functools.partial(_eager, benchmark=True, channels_last=True),
        "reduce-overhead": functools.partial(_compiled, {"mode": "reduce-overhead"}),
    }
    if given.autotune_limit:
        found[_AUTOTUNED] = functools.partial(_autotuned, given.autotune_limit, name, batch, precision)
    mode = {"mode": "reduce-overhead"}
    found[CONVERTED] = _converted
    found[DEFAULT] = functools.partial(_compiled, {"backend": "ai3", "options": mode})
    found[AUTO] = functools.partial(_compiled, {"backend": "ai3", "options": {**mode, **AUTO_OPTIONS}})
    return found


def _last(model: torch.nn.Module, image: torch.Tensor) -> tuple[torch.nn.Module, torch.Tensor]:
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, image.contiguous(memory_format=torch.channels_last)


def _inference(model: Callable[[torch.Tensor], Any], image: torch.Tensor, benchmark: bool) -> Side:
    def run() -> Any:
        torch.backends.cudnn.benchmark = benchmark
        with torch.inference_mode():
            return model(image)

    return Side(run, image)


def _eager(model: torch.nn.Module, image: torch.Tensor, *, benchmark: bool, channels_last: bool) -> Side:
    model, image = _last(model, image) if channels_last else (model, image)
    return _inference(model, image, benchmark)


def _compiled(arguments: Mapping[str, Any], model: torch.nn.Module, image: torch.Tensor) -> Side:
    model, image = _last(model, image)
    torch.compiler.reset()
    compiled = torch.compile(model, **arguments)

    # Not in inference mode: CUDA graphs are kept apart by it, and users compile under no_grad.
    def run() -> Any:
        torch.backends.cudnn.benchmark = True
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(image)

    return Side(run, image)


def _converted(model: torch.nn.Module, image: torch.Tensor) -> Side:
    model, image = _last(model, image)
    converted = ai3.convert(model, AUTO_OPTIONS, tuple(image.shape))
    return _inference(converted, image, True)


def _autotuned(
    limit: float, name: str, batch: int, precision: str, model: torch.nn.Module, image: torch.Tensor
) -> Side:
    """Inductor's own search fills its caches in a process of its own, which can be ended."""
    program = [sys.executable, "-m", __spec__.name, name, str(batch), precision]  # type: ignore[union-attr]
    try:
        done = subprocess.run(program, timeout=limit, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"it had not ended after {limit:g} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(next((line for line in reversed(lines) if "Error: " in line), "it failed"))
    return _compiled({"mode": _AUTOTUNED}, model, image)


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def _free() -> None:
    torch.compiler.reset()
    with contextlib.suppress(AttributeError):
        torch._inductor.cudagraph_trees.reset_cudagraph_trees()
    gc.collect()
    torch.cuda.empty_cache()


def ratios(times: Mapping[str, float]) -> dict[str, Any]:
    """The best peer, and ai3's times over its time; None for what was not measured."""
    others = {name: time for name, time in times.items() if name not in OURS}
    best = min(others, key=others.__getitem__, default=None)
    return {
        "best peer": best,
        **{key: times[side] / times[best] if best and side in times else None for key, side in RATIOS.items()},
    }


def finish(result: dict[str, Any]) -> None:
    groups = {f"{row['precision']}, batch {row['batch']}": (row["precision"], row["batch"]) for row in result["rows"]}
    result["geometric mean"] = {
        label: {
            key: timing.geometric_mean(
                row[key] for row in result["rows"] if (row["precision"], row["batch"]) == group and row[key] is not None
            )
            for key in RATIOS
        }
        for label, group in groups.items()
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    rows, sides = (
        result["rows"],
        [s for s in result["sides"] if any(s in row["milliseconds"] for row in result["rows"])],
    )
    header = ["network", "precision", "batch", *sides, "best peer", *(f"{side} / best" for side in RATIOS.values())]
    times = Table(f"Median milliseconds, {gpu.where(result)}", header)
    errors = Table("Largest error relative to the largest output, against float64", header[: 3 + len(sides)])
    first = Table("Seconds to the first output, compiling and tuning", header[: 3 + len(sides)])
    for row in rows:
        where = [row["model"], row["precision"], str(row["batch"])]
        values = [number(row["milliseconds"].get(side), 3) for side in sides]
        times.rows.append([*where, *values, row["best peer"] or "-", *(number(row[key]) for key in RATIOS)])
        found = row["relative error"]
        errors.rows.append([*where, *(f"{found[side]:.1e}" if side in found else "-" for side in sides)])
        first.rows.append([*where, *(number(row["seconds to the first call"].get(side), 1) for side in sides)])
    for label, means in result.get("geometric mean", {}).items():
        precision, _, batch = label.partition(", batch ")
        blank = ["" for _ in (*sides, "best peer")]
        times.rows.append(["geometric mean", precision, batch, *blank, *(number(mean) for mean in means.values())])
    times.notes = [
        f"{row['model']}, {row['precision']}, batch {row['batch']}: {side} {reason}"
        for row in rows
        for side, reason in row["not measured"].items()
        if reason != "left out by --without"
    ]
    return [times, errors, first]


def _autotune(arguments: Sequence[str]) -> None:
    name, batch, precision = arguments
    _set_precision(precision)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    model = zoo.load_model(f"torchvision:{name}").cuda().to(dtype)
    image = torch.randn(int(batch), *zoo.default_shape(name)[1:], device="cuda", dtype=dtype)
    _compiled({"mode": _AUTOTUNED}, model, image)()


if __name__ == "__main__":
    _autotune(sys.argv[1:])
