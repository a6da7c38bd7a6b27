"""Every linear algorithm and torch, with a bias, in inference with the weights packed."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ai3_compile.testing.calls import make

from . import layers, peak
from .table import Table

ROUNDS = 20
# Rows, inputs, outputs: VGG's largest, a transformer's at batch 1 and 10, and what 1x1 convolutions come to.
SHAPES = (
    (1, 25088, 4096),
    (1, 768, 3072),
    (197, 768, 768),
    (197, 768, 3072),
    (197, 3072, 768),
    (1970, 768, 768),
    (196, 256, 1024),
    (3136, 256, 64),
    (49, 512, 2048),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def describe(given: argparse.Namespace) -> dict[str, object]:
    return {"GB/s": "of one row: the weight's bytes over the time"}


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each shape: milliseconds, GFLOP/s, and where there is one row of inputs the weight's bytes a second."""
    known = layers.algorithms("linear")
    for rows, inputs, outputs in SHAPES:
        shape = f"{rows}x{inputs} -> {outputs}"
        print(f"linear {shape}", file=sys.stderr)
        weight = torch.randn(outputs, inputs)
        call = make("linear", shape, {}, torch.randn(rows, inputs), weight, torch.randn(outputs))
        assert call is not None
        refused = {a.qualified: reason for a in known if (reason := a.supports(call.spec)) is not None}
        sides = {a.qualified: layers.side(a, call) for a in known if a.qualified not in refused}
        torch_side = functools.partial(F.linear, call.input, call.weight, call.bias)  # type: ignore[arg-type]
        found = layers.row(call, {"torch": torch_side, **sides}, refused, given.rounds)
        if rows == 1:
            found["GB/s"] = {name: 4e-6 * weight.numel() / time for name, time in found["milliseconds"].items()}
        yield {"shape": shape, **found}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Those of every operation, and the bandwidth of what has one row."""
    rows = [row for row in result["rows"] if "GB/s" in row]
    read = result["peak"][peak.READ][str(result["threads"])]
    names = list(dict.fromkeys(name for row in rows for name in row["GB/s"]))
    table = Table(f"linear: GB/s of the weight (reading memory gives {read:.1f})", ["shape", *names])
    table.rows = [[row["shape"], *(f"{row['GB/s'][name]:.1f}" for name in names)] for row in rows]
    return [*layers.tables(result), table]


finish = layers.finish
