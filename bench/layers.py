"""What the benches of single operations share: ai3's algorithms as sides, rates, shares of the peak."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from ai3_compile import core, registry
from ai3_compile.ops import OPERATIONS
from ai3_compile.testing.calls import Call

from . import peak, timing
from .table import Table, number

LAST = "torch channels_last"


def algorithms(operation: str) -> list[registry.Algorithm]:
    """Those of ai3 that this machine can run, built and loaded."""
    core.load()
    registry.prepare([(operation, "cpu")])
    unavailable = registry.system().platforms
    known = registry.for_device(operation, "cpu")
    return [a for a in known if a.platform != "torch" and unavailable[a.platform] is None]


def side(algorithm: registry.Algorithm, call: Call, channels_last: bool = False) -> timing.Side:
    """The call of ai3's operation, as a compiled graph makes it: weights packed once, output in the input's layout."""
    operation = OPERATIONS[algorithm.operation]
    args, named = operation.arguments(call.input, call.weight, call.bias, call.attributes, algorithm.id, True)
    if channels_last:
        named["channels_last"] = True
    return functools.partial(operation.overload_for(algorithm), *args, **named)


def channels_last(call: Call) -> Call:
    """The same call on tensors of that layout."""
    assert call.weight is not None
    input, weight = (t.contiguous(memory_format=torch.channels_last) for t in (call.input, call.weight))
    return dataclasses.replace(call, input=input, weight=weight)


def row(call: Call, sides: Mapping[str, timing.Side], refused: Mapping[str, str], rounds: int) -> dict[str, Any]:
    """Times and rates of one shape: as if computed directly, 2 operations a product, whatever the algorithm does."""
    with torch.inference_mode():
        seconds = timing.medians(sides, rounds)
        operations = 2 * sides["torch"]().numel() * call.terms  # type: ignore[attr-defined]
    return {
        "milliseconds": {name: value * 1e3 for name, value in seconds.items()},
        "GFLOP/s": {name: operations / value / 1e9 for name, value in seconds.items()},
        "refused": dict(refused),
    }


def finish(result: dict[str, Any]) -> None:
    """Writes the shares of the peak, which is known when everything has been measured."""
    best = result["peak"][peak.GFLOPS][str(result["threads"])]
    for found in result["rows"]:
        found["share of FMA peak"] = {name: rate / best for name, rate in found["GFLOP/s"].items()}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A table of milliseconds, one of GFLOP/s with the share of the peak in per cent."""
    rows = result["rows"]
    names = list(dict.fromkeys(name for found in rows for name in (*found["milliseconds"], *found["refused"])))
    threads = f"{result['threads']} threads of {result['cpu']} ({result['isa']})"
    times = Table(f"{result['bench']}: median milliseconds, {threads}", ["shape", *names])
    rates = Table(f"{result['bench']}: effective GFLOP/s (per cent of the FMA peak)", ["shape", *names])
    for found in rows:
        times.rows.append([found["shape"], *(number(found["milliseconds"].get(name), 3) for name in names)])
        share = found["share of FMA peak"]
        rates.rows.append(
            [
                found["shape"],
                *(f"{found['GFLOP/s'][n]:.0f} ({share[n] * 100:.0f})" if n in share else "-" for n in names),
            ]
        )
    rates.notes = [
        f"measured {name}: " + ", ".join(f"{value:.1f} with {n} thread{'s' * (n != '1')}" for n, value in found.items())
        for name, found in result["peak"].items()
    ]
    return [times, rates]
