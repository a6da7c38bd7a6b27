"""What a call costs besides computing: ai3 on a 1x8x8x8 input over the same in PyTorch."""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

import ai3_compile as ai3
from ai3_compile import registry
from ai3_compile.ops import OPERATIONS
from ai3_compile.testing.calls import make

from . import layers, timing
from .table import Table

ROUNDS = 20
CALLS = 1000
"""In a timed loop: one call takes less than a clock tells."""
OPERATION, MODULE, COMPILED = "operation", "swapped module", "compiled"
SUBJECTS = ("conv2d", "linear", "maxpool2d", "relu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def describe(given: argparse.Namespace) -> dict[str, object]:
    return {
        "input": "1x8x8x8",
        OPERATION: "torch.ops.ai3.* against torch.ops.aten.*",
        MODULE: "after swap_operation against the module as it was",
        COMPILED: 'torch.compile(module, backend="ai3") against torch.compile(module)',
    }


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each operation and way of calling it: microseconds of ai3 and of PyTorch."""
    for operation in SUBJECTS:
        print(f"overhead of {operation}", file=sys.stderr)
        for way, (mine, theirs) in _pairs(operation).items():
            with torch.inference_mode():
                mine(), theirs()  # what is compiled, is compiled here
                seconds = timing.medians({"ai3": _loop(mine), "torch": _loop(theirs)}, given.rounds)
            yield {
                "operation": operation,
                "way": way,
                "microseconds": {name: value / CALLS * 1e6 for name, value in seconds.items()},
                "ratio": seconds["ai3"] / seconds["torch"],
            }
        torch.compiler.reset()


def _pairs(operation: str) -> dict[str, tuple[timing.Side, timing.Side]]:
    image = torch.randn(1, 8, 8, 8)
    module, aten = _module(operation, image)
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    attributes = dict(OPERATIONS[operation].attributes_of(module))
    call = make(operation, operation, attributes, image, weight, bias)
    assert call is not None
    algorithm = _algorithm(operation)
    swapped = copy.deepcopy(module)
    ai3.swap_operation(operation, swapped, algorithm.qualified)
    compiled = torch.compile(copy.deepcopy(module), backend="ai3", options={operation: algorithm.qualified})
    inductor = torch.compile(module)
    return {
        OPERATION: (layers.side(algorithm, call), aten),
        MODULE: (lambda: swapped(image), lambda: module(image)),
        COMPILED: (lambda: compiled(image), lambda: inductor(image)),
    }


def _module(operation: str, image: torch.Tensor) -> tuple[nn.Module, timing.Side]:
    """The module in eval mode, and its operation of ATen's on the same tensors."""
    aten = torch.ops.aten
    if operation == "conv2d":
        conv = nn.Conv2d(8, 8, 3, padding=1).eval()
        return conv, lambda: aten.conv2d.default(image, conv.weight, conv.bias, [1, 1], [1, 1])
    if operation == "linear":
        linear = nn.Linear(8, 8).eval()
        return linear, lambda: aten.linear.default(image, linear.weight, linear.bias)
    if operation == "maxpool2d":
        return nn.MaxPool2d(2).eval(), lambda: aten.max_pool2d.default(image, [2, 2], [2, 2])
    return nn.ReLU().eval(), lambda: aten.relu.default(image)


def _algorithm(operation: str) -> registry.Algorithm:
    """The first of those that are ai3's own: how long it computes hardly counts here."""
    return next(a for a in layers.algorithms(operation) if a.platform == "cpp")


def _loop(function: Callable[[], object]) -> timing.Side:
    def loop() -> None:
        for _ in itertools.repeat(None, CALLS):
            function()

    return loop


def finish(result: dict[str, Any]) -> None:
    pass


def tables(result: Mapping[str, Any]) -> list[Table]:
    table = Table(
        f"Microseconds of a call on a 1x8x8x8 input, {result['threads']} threads of {result['cpu']}",
        ["operation", "way of calling", "ai3", "torch", "ai3 / torch"],
    )
    for row in result["rows"]:
        times = row["microseconds"]
        table.rows.append(
            [row["operation"], row["way"], f"{times['ai3']:.2f}", f"{times['torch']:.2f}", f"{row['ratio']:.2f}"]
        )
    return [table]
