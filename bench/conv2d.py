"""Every convolution algorithm and torch in both layouts, in inference with the weights packed."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ai3_compile import registry
from ai3_compile.testing.calls import Call
from ai3_compile.testing.shapes import calls_of

from . import aithree, gpu, gpu_conv2d, gpu_models, layers, timing
from .table import Table

ROUNDS = 10
# batch, channels, side, filters, kernel, stride
Layer = tuple[int, int, int, int, int, int]
# Those that aithree was measured on.
AITHREE: tuple[Layer, ...] = (
    (10, 3, 224, 3, 3, 1),
    (10, 64, 112, 64, 3, 1),
    (10, 256, 28, 256, 3, 1),
    (10, 512, 14, 512, 3, 1),
)
# Channels and side of the 3x3 convolutions that networks are made of, for the batches that are asked for.
GRID = ((64, 112), (64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7))
# The distinct convolutions of ResNet-18 at batch 1.
RESNET18: tuple[Layer, ...] = (
    (1, 3, 224, 64, 7, 2),
    (1, 64, 56, 64, 3, 1),
    (1, 64, 56, 128, 3, 2),
    (1, 64, 56, 128, 1, 2),
    (1, 128, 28, 128, 3, 1),
    (1, 128, 28, 256, 3, 2),
    (1, 256, 14, 256, 3, 1),
    (1, 256, 14, 512, 3, 2),
    (1, 512, 7, 512, 3, 1),
)
GROUPS = ("aithree", "grid", "resnet18")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="of shapes")
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 10), help="of the grid")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", nargs="+", choices=gpu_models.PRECISIONS, default=gpu_models.PRECISIONS)
    parser.add_argument("--aithree", type=Path, help=f"where aithree is, to be measured too: {aithree.INSTALL}")


def describe(given: argparse.Namespace) -> dict[str, object]:
    if given.device == "cuda":
        return {**gpu.describe(), "device": "cuda", "layouts": "as on the CPU; torch without its settings too"}
    return {"layouts": "torch in both; each algorithm of ai3 in the one that it works on without converting"}


def shapes(groups: tuple[str, ...], batches: tuple[int, ...]) -> dict[str, list[Layer]]:
    """The layers by the title they are shown under."""
    found: dict[str, list[Layer]] = {}
    if "aithree" in groups:
        found["aithree's"] = list(AITHREE)
    for batch in batches if "grid" in groups else ():
        found[f"3x3, batch {batch}"] = [(batch, channels, side, channels, 3, 1) for channels, side in GRID]
    if "resnet18" in groups:
        found["ResNet-18"] = list(RESNET18)
    return found


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each layer: milliseconds and GFLOP/s of each side, and the reasons of what cannot run it."""
    if given.device == "cuda":
        yield from gpu_conv2d.measure(given, shapes(tuple(given.groups), tuple(given.batch)))
        return
    known = layers.algorithms("conv2d")
    theirs = None if given.aithree is None else aithree.load(given.aithree)
    for group, wanted in shapes(tuple(given.groups), tuple(given.batch)).items():
        for batch, channels, side, filters, kernel, stride in wanted:
            shape = f"{batch}x{channels}x{side}x{side} {filters} {kernel}x{kernel}/{stride}"
            print(f"conv2d {shape}", file=sys.stderr)
            fields = {
                "input": (batch, channels, side, side),
                "weight": (filters, channels, kernel, kernel),
                "stride": stride,
                "padding": kernel // 2,
            }
            (call,) = calls_of("conv2d", [fields], torch.float32)
            others = {} if theirs is None or group != "aithree's" else aithree.sides(theirs, call)
            yield {"group": group, "shape": shape, **_row(call, known, others, given.rounds)}


def _row(call: Call, known: list[registry.Algorithm], others: Mapping[str, timing.Side], rounds: int) -> dict[str, Any]:
    last = layers.channels_last(call)
    sides: dict[str, timing.Side] = {"torch": _torch(call), layers.LAST: _torch(last), **others}
    refused = {}
    for algorithm in known:
        reason = algorithm.supports(call.spec)
        if reason is not None:
            refused[algorithm.qualified] = reason
            continue
        nhwc = registry.platforms()[algorithm.platform].prefers_channels_last(algorithm)
        sides[algorithm.qualified] = layers.side(algorithm, last if nhwc else call, nhwc)
    return layers.row(call, sides, refused, rounds)


def _torch(call: Call) -> timing.Side:
    return functools.partial(
        torch.conv2d, call.input, call.weight, None, call.attributes["stride"], call.attributes["padding"]
    )


def finish(result: dict[str, Any]) -> None:
    (gpu_conv2d if result.get("device") == "cuda" else layers).finish(result)


def tables(result: Mapping[str, Any]) -> list[Table]:
    return (gpu_conv2d if result.get("device") == "cuda" else layers).tables(result)
