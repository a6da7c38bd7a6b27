"""Operations that move more than they compute, against the copying of memory: depthwise convolutions, pools, relu."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ai3_compile.testing.calls import make

from . import layers, peak, timing
from .table import Table, number

ROUNDS = 15
# As large as can be without the allocator asking the system for fresh pages at every call, whose zeroing takes longer.
IMAGE = (8, 256, 56, 56)
DEPTHWISE, MAX, MEAN, ADAPTIVE, RELU = "conv2d", "maxpool2d", "avgpool2d", "adaptiveavgpool2d", "relu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def describe(given: argparse.Namespace) -> dict[str, object]:
    return {"GB/s": "of input and output together over the time, in channels_last; torch in its better layout"}


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for title, operation, shape, attributes, torch_side in _cases():
        print(title, file=sys.stderr)
        torch.manual_seed(0)
        input = torch.randn(shape).to(memory_format=torch.channels_last)
        weight = torch.randn(shape[1], 1, 3, 3) if operation == DEPTHWISE else None
        call = make(operation, title, attributes, input, weight)
        assert call is not None
        (chosen,) = (a for a in layers.algorithms(operation) if a.name == "direct")
        sides = {
            chosen.qualified: layers.side(chosen, call, channels_last=operation != RELU),
            "torch": functools.partial(torch_side, input.contiguous(), weight),
            layers.LAST: functools.partial(torch_side, input, weight),
        }
        with torch.inference_mode():
            seconds = timing.medians(sides, given.rounds)
            moved = 4e-9 * (input.numel() + torch_side(input, weight).numel())
        yield {
            "operation": title,
            "milliseconds": {name: value * 1e3 for name, value in seconds.items()},
            "GB/s": {name: moved / value for name, value in seconds.items()},
        }


def _cases() -> Iterator[tuple[str, str, tuple[int, ...], dict[str, Any], Any]]:
    """Title, operation, shape of the input, attributes, and the same by torch on an input and a weight."""
    window = {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0), "ceil_mode": False}
    indices = {"dilation": (1, 1), "return_indices": False}
    for stride in (1, 2):
        padded = {"stride": (stride, stride), "padding": (1, 1), "dilation": (1, 1), "groups": IMAGE[1]}
        by_torch = functools.partial(F.conv2d, bias=None, **padded)  # type: ignore[arg-type]
        yield f"depthwise 3x3, stride {stride}", DEPTHWISE, IMAGE, padded, by_torch
    yield "max pool 2x2", MAX, IMAGE, {**window, **indices}, lambda x, _: F.max_pool2d(x, 2)
    overlapping = {**window, "kernel_size": (3, 3), "padding": (1, 1), **indices}
    yield "max pool 3x3, stride 2", MAX, IMAGE, overlapping, lambda x, _: F.max_pool2d(x, 3, 2, 1)
    means = {**window, "count_include_pad": True, "divisor_override": None}
    yield "average pool 2x2", MEAN, IMAGE, means, lambda x, _: F.avg_pool2d(x, 2)
    yield "global average pool", ADAPTIVE, IMAGE, {"output_size": (1, 1)}, lambda x, _: F.adaptive_avg_pool2d(x, 1)
    yield "relu", RELU, IMAGE, {}, lambda x, _: F.relu(x)


def finish(result: dict[str, Any]) -> None:
    copied = result["peak"][peak.COPY][str(result["threads"])]
    for row in result["rows"]:
        row["share of copying"] = {name: rate / copied for name, rate in row["GB/s"].items()}


def tables(result: Mapping[str, Any]) -> list[Table]:
    copied = result["peak"][peak.COPY][str(result["threads"])]
    names = list(result["rows"][0]["GB/s"]) if result["rows"] else []
    table = Table(f"GB/s (per cent of copying's {copied:.1f}), milliseconds", ["operation", *names])
    for row in result["rows"]:
        cells = (
            f"{row['GB/s'][n]:.1f} ({row['share of copying'][n] * 100:.0f}) {number(row['milliseconds'][n], 2)}"
            for n in names
        )
        table.rows.append([row["operation"], *cells])
    return [table]
