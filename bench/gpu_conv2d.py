"""Single convolutions on a GPU: every algorithm of every platform, and torch with its settings, by precision."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ai3_compile import core, gpu_timing, registry
from ai3_compile.backends import gpu as settings
from ai3_compile.selection import Use
from ai3_compile.testing.calls import Call, in_dtype
from ai3_compile.testing.shapes import calls_of

from . import gpu, layers
from .table import Table, number

BENCHMARK, BENCHMARK_LAST = "torch, benchmark", "torch channels_last, benchmark"
TORCH = ("torch", BENCHMARK, BENCHMARK_LAST)


def measure(given: argparse.Namespace, groups: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """A row for each layer and precision: milliseconds of each side, and the reasons of what cannot run it."""
    core.load()
    registry.prepare([("conv2d", "cuda")])
    reasons = registry.system().platforms
    known = [a for a in registry.of_operation("conv2d") if a.platform != "torch" and reasons[a.platform] is None]
    for precision in given.precision:
        for group, wanted in groups.items():
            for batch, channels, side, filters, kernel, stride in wanted:
                shape = f"{batch}x{channels}x{side}x{side} {filters} {kernel}x{kernel}/{stride}"
                print(f"conv2d {shape} {precision}", file=sys.stderr, flush=True)
                fields = {
                    "input": (batch, channels, side, side),
                    "weight": (filters, channels, kernel, kernel),
                    "stride": stride,
                    "padding": kernel // 2,
                }
                (made,) = calls_of("conv2d", [fields], torch.float32)
                with settings.precision(tf32=precision == "tf32"):
                    call = in_dtype(made, torch.float16 if precision == "fp16" else torch.float32, "cuda")
                    yield {"group": group, "shape": shape, "precision": precision, **_row(call, known)}


def _row(call: Call, known: list[registry.Algorithm]) -> dict[str, Any]:
    last = layers.channels_last(call)
    sides: dict[str, Callable[[], Any]] = {
        "torch": functools.partial(_torch, call, False),
        BENCHMARK: functools.partial(_torch, call, True),
        BENCHMARK_LAST: functools.partial(_torch, last, True),
    }
    refused, core_errors = {}, {}
    core.follow_numerics()
    for algorithm in known:
        reason = algorithm.supports(call.spec)
        if reason is not None:
            refused[algorithm.qualified] = reason
            continue
        platform = registry.platforms()[algorithm.platform]
        platform.search([algorithm], call.spec, Use(in_graph=True))
        nhwc = platform.prefers_channels_last(algorithm)
        sides[algorithm.qualified] = layers.side(algorithm, last if nhwc else call, nhwc)
    with torch.inference_mode():
        expected = call.compute(torch.float64)
        for name, run in sides.items():
            core_errors[name] = ((run().double() - expected).abs().max() / expected.abs().max()).item()
    seconds = gpu_timing.seconds(sides)
    operations = 2 * expected.numel() * call.terms
    return {
        "GFLOP/s": {name: operations / value / 1e9 for name, value in seconds.items()},
        "milliseconds": {name: value * 1e3 for name, value in seconds.items()},
        "relative error": core_errors,
        "refused": refused,
    }


def _torch(call: Call, benchmark: bool) -> torch.Tensor:
    torch.backends.cudnn.benchmark = benchmark
    return torch.conv2d(call.input, call.weight, None, call.attributes["stride"], call.attributes["padding"])


def finish(result: dict[str, Any]) -> None:
    """Writes the best of ai3's algorithms over torch with its benchmark mode on, in its better layout."""
    for row in result["rows"]:
        times = row["milliseconds"]
        ours = {name: time for name, time in times.items() if name not in TORCH}
        best = min(ours, key=ours.__getitem__)
        row["best"] = best
        row["ratio"] = ours[best] / min(times[BENCHMARK], times[BENCHMARK_LAST])


def tables(result: Mapping[str, Any]) -> list[Table]:
    rows = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    title = f"conv2d: median milliseconds in CUDA graphs, {gpu.where(result)}"
    times = Table(title, ["shape", "precision", *names, "best of ai3", "best / torch, benchmark"])
    errors = Table(
        "conv2d: largest error relative to the largest output, against float64", times.header[: 2 + len(names)]
    )
    for row in rows:
        where, found = [row["shape"], row["precision"]], row["relative error"]
        times.rows.append(
            [*where, *(number(row["milliseconds"].get(name), 4) for name in names), row["best"], number(row["ratio"])]
        )
        errors.rows.append([*where, *(f"{found[name]:.1e}" if name in found else "-" for name in names)])
    return [times, errors]
