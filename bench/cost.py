"""What the choice of `guess` is measured against: every convolution algorithm on a grid of shapes and on networks."""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ai3_compile import registry, zoo
from ai3_compile.backends import cpp
from ai3_compile.backends.builder import cpu_isa
from ai3_compile.selection import costs
from ai3_compile.selection.select import cheapest
from ai3_compile.testing.calls import Call
from ai3_compile.testing.shapes import calls_of

from . import layers, models
from .table import Table
from .timing import Side

ROUNDS = 5
GRID, NETWORKS = "grid", "networks"
# The grid: combinations drawn from these, as networks have them.
_CHANNELS = (3, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 480, 512, 672, 768, 960, 1024, 2048)
_SIDES = (7, 8, 10, 13, 14, 17, 20, 27, 28, 35, 40, 56, 73, 112, 147, 224)
_KERNELS = ((1, 1), (1, 1), (1, 1), (3, 3), (3, 3), (3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (1, 7), (7, 1))
_MOST_PRODUCTS, _MOST_ELEMENTS = 2e9, 2**24
_HOPELESS = 4.0
"""An algorithm that many times slower than the best is timed once."""
NEAR = 1.1
"""A choice that takes so many times the best one's time, at most, counts as right."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", type=int, default=400, help="of the grid; default 400")
    parser.add_argument("--models", nargs="*", choices=models.MODELS, default=models.MODELS)
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 10), help="of the networks")


def describe(given: argparse.Namespace) -> dict[str, object]:
    return {
        "seconds": "medians; images in the layout that each algorithm works on, weights packed; torch's the better of "
        "both layouts; onednn: torch's own oneDNN convolution with weights reordered before, in channels_last",
        "estimate": "what the kernel says of itself, corrected by the shipped table",
    }


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    known = layers.algorithms("conv2d")
    wanted = [(GRID, fields) for fields in _grid(given.shapes)]
    wanted += [(NETWORKS, fields) for batch in given.batch for fields in _layers(given.models, batch)]
    for number, (kind, fields) in enumerate(wanted):
        print(f"\rshape {number + 1} of {len(wanted)}", end="", file=sys.stderr)
        (call,) = calls_of("conv2d", [fields], torch.float32)
        yield {
            "set": kind,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()},
            "output": list(call.spec.output_shape),
            **_row(call, known, given.rounds),
        }
    print(file=sys.stderr)


def _grid(count: int) -> list[dict[str, Any]]:
    """Distinct shapes, drawn with a fixed seed."""
    draw = random.Random(0)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        kernel, side, channels, filters = (draw.choice(x) for x in (_KERNELS, _SIDES, _CHANNELS, _CHANNELS))
        batch, stride, groups = draw.choice((1, 1, 1, 2, 4, 10)), draw.choice((1, 1, 1, 2)), 1
        kind = draw.random()
        if kind < 0.15:  # depthwise
            filters = groups = channels
        elif kind < 0.25 and channels % 8 == 0 and filters % 8 == 0:
            groups = draw.choice((2, 4, 8))
        fields = {
            "input": (batch, channels, side, side),
            "weight": (filters, channels // groups, *kernel),
            "stride": stride,
            "padding": (kernel[0] // 2, kernel[1] // 2),
            "groups": groups,
        }
        pixels = batch * (side // stride) ** 2
        products = pixels * filters * channels // groups * kernel[0] * kernel[1]
        elements = max(
            batch * channels * side**2, pixels * filters, filters * channels // groups * kernel[0] * kernel[1]
        )
        if 1e5 < products < _MOST_PRODUCTS and elements < _MOST_ELEMENTS:
            found[str(fields)] = fields
    return list(found.values())


def _layers(names: Sequence[str], batch: int) -> list[dict[str, Any]]:
    """The distinct convolutions of networks."""
    found: dict[str, dict[str, Any]] = {}

    def note(module: torch.nn.Conv2d, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        fields = {
            "input": (batch, *inputs[0].shape[1:]),
            "weight": tuple(module.weight.shape),
            "stride": module.stride,
            "padding": module.padding,
            "dilation": module.dilation,
            "groups": module.groups,
        }
        found[str(fields)] = fields

    for name in names:
        model = zoo.load_model(f"torchvision:{name}")
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(note)
        with torch.inference_mode():
            model(torch.randn(zoo.default_shape(name)))
    return list(found.values())


def _row(call: Call, known: list[registry.Algorithm], rounds: int) -> dict[str, Any]:
    last = layers.channels_last(call)
    sides: dict[str, Side] = {"torch": _torch(call), layers.LAST: _torch(last), "onednn": _onednn(last)}
    estimates, bare = {}, {}
    for algorithm in known:
        if algorithm.only_by_name is not None or algorithm.supports(call.spec) is not None:
            continue
        platform = registry.platforms()[algorithm.platform]
        nhwc = platform.prefers_channels_last(algorithm)
        sides[algorithm.qualified] = layers.side(algorithm, last if nhwc else call, nhwc)
        bare[algorithm.qualified] = cpp.PLATFORM.estimate(algorithm, call.spec)
        factor = costs.factor(algorithm.qualified, cpu_isa(), call.spec)
        estimates[algorithm.qualified] = bare[algorithm.qualified] * factor
    with torch.inference_mode():
        seconds = _medians(sides, rounds)
    seconds["torch"] = min(seconds["torch"], seconds.pop(layers.LAST))
    return {"seconds": seconds, "kernel's estimate": bare, "estimate": estimates}


def _torch(call: Call) -> Side:
    window = (call.attributes[name] for name in ("stride", "padding", "dilation", "groups"))
    return functools.partial(torch.conv2d, call.input, call.weight, None, *window)


def _onednn(call: Call) -> Side:
    a, weight = call.attributes, call.weight
    assert weight is not None
    window = (a["padding"], a["stride"], a["dilation"], a["groups"])
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *window, call.input.shape)
    return functools.partial(torch.ops.mkldnn._convolution_pointwise, call.input, packed, None, *window, "none", [], "")


def _medians(sides: Mapping[str, Side], rounds: int) -> dict[str, float]:
    """In turn, without the rests of the other benches: these sides share one pool of threads."""
    taken: dict[str, list[float]] = {}
    for name, side in sides.items():
        side()
        side()
        taken[name] = [_seconds(side)]
    best = min(times[0] for times in taken.values())
    for _ in range(rounds):
        for name, side in sides.items():
            if taken[name][0] < _HOPELESS * best:
                side()
                taken[name] += [_seconds(side), _seconds(side)]
    return {name: statistics.median(times) for name, times in taken.items()}


def _seconds(side: Side) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def right(row: Mapping[str, Any], estimates: Mapping[str, float]) -> float:
    """The time of the algorithm that `guess` takes by these estimates over the best one's."""
    seconds = {name: row["seconds"][name] for name in estimates}
    chosen = cheapest([registry.find("conv2d", name) for name in estimates], estimates)
    assert chosen is not None
    return seconds[chosen.qualified] / min(seconds.values())


def finish(result: dict[str, Any]) -> None:
    """The share of shapes on which the shipped model's choice is within 10 % of the best."""
    result["within 10 %"] = {}
    for kind in (GRID, NETWORKS):
        losses = [right(row, row["estimate"]) for row in result["rows"] if row["set"] == kind]
        if losses:
            result["within 10 %"][kind] = sum(loss <= NEAR for loss in losses) / len(losses)


def tables(result: Mapping[str, Any]) -> list[Table]:
    rows = result["rows"]
    names = sorted({name for row in rows for name in row["seconds"]})
    table = Table("How often each is the fastest, and within 10 % of the best", ["", *names])
    for kind in (GRID, NETWORKS):
        found = [row["seconds"] for row in rows if row["set"] == kind]
        for label, near in (("fastest", 1.0), ("within 10 %", NEAR)):
            counts = (sum(n in s and s[n] <= near * min(s.values()) for s in found) for n in names)
            table.rows.append([f"{kind}: {label}", *(str(count) for count in counts)])
    shares = (f"{kind}: {share * 100:.0f} %" for kind, share in result["within 10 %"].items())
    table.notes = ["guess is within 10 % of the best of ai3's algorithms on " + ", ".join(shares)]
    return [table]
