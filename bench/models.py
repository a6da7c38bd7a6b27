"""Whole networks: ai3 against eager, Inductor, ONNX Runtime and OpenVINO, with errors and memory."""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor.codecache import PyCodeCache

from . import gpu_models, machine, memory, peers, timing
from .table import Table, number

MODELS = (
    "alexnet",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v3_large",
    "resnet50",
    "resnet152",
    "squeezenet1_1",
    "swin_b",
    "vgg16",
    "vit_b_16",
)
BATCHES = (1, 10)
ROUNDS = 10
_SPARE = 1.5 * 2**30
_COPIES = 5
"""How often a side may hold the weights while it prepares itself: the model's, as constants, folded, packed, saved."""
RATIOS = {"ratio": peers.COMPILED, "ratio converted": peers.CONVERTED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batch", nargs="+", type=int, help="1 and 10; on a GPU also 64")
    parser.add_argument("--without", nargs="+", default=(), metavar="SIDE", help="sides to leave out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    gpu_models.add_arguments(parser)


def describe(given: argparse.Namespace) -> dict[str, object]:
    if given.device == "cuda":
        return gpu_models.describe(given)
    reason = memory.unmeasurable()
    return {
        "models": list(given.models),
        "batches": list(given.batch or BATCHES),
        "sides": peers.describe(given.without),
        "relative error": "max|y - reference| / max|reference|, the reference being eager in float64",
        "extra memory MiB": reason
        or "the peak of one call over what its process held before it; not of ONNX Runtime and OpenVINO, which keep "
        "their memory between calls",
    }


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each batch and network: milliseconds of each side, and of those that have none the reason."""
    if given.device == "cuda":
        yield from gpu_models.measure(given)
        return
    for batch in given.batch or BATCHES:
        for name in given.models:
            print(f"{name}, batch {batch}", file=sys.stderr)
            row = _row(name, batch, given.rounds, given.without)
            _free()
            if memory.unmeasurable() is None:
                measured = [side for side in memory.SIDES if side in row["milliseconds"]]
                row["extra memory MiB"] = memory.measure(name, batch, measured)
            yield row


def _row(name: str, batch: int, rounds: int, without: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        network = peers.load(name, batch, Path(folder))
        with torch.inference_mode():
            expected = copy.deepcopy(network.model).double()(network.image.double())
            sides, failed = _prepared(network, without)
            errors = {side: _relative_error(call(), expected) for side, call in sides.items()}
            seconds = timing.medians(sides, rounds)
    times = {side: value * 1e3 for side, value in seconds.items()}
    return {
        "model": name,
        "batch": batch,
        "milliseconds": times,
        "not measured": failed,
        **ratios(times),
        "relative error": errors,
        "extra memory MiB": {},
    }


def _prepared(network: peers.Network, without: Sequence[str]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The sides that can be timed, and the reasons of those that cannot."""
    sides: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for peer in (*peers.PEERS, *peers.OURS):
        reason = "left out by --without" if peer.name in without else peer.missing() or _too_large(network)
        if reason is not None:
            failed[peer.name] = reason
            continue
        try:
            sides[peer.name] = peer.make(network)
            sides[peer.name]()
        except Exception as error:  # another library's: whatever it raises is shown, and the others are measured
            sides.pop(peer.name, None)
            failed[peer.name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return sides, failed


def _too_large(network: peers.Network) -> str | None:
    needed, free = _COPIES * network.weight_bytes + _SPARE, machine.available_memory()
    if needed <= free:
        return None
    return f"left out: it may need {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"


def _relative_error(found: Any, expected: torch.Tensor) -> float:
    difference = torch.as_tensor(found).double() - expected
    return (difference.abs().max() / expected.abs().max()).item()


def _free() -> None:
    """Lets go of what a compiled network leaves behind in the process, its frozen weights among it."""
    torch.compiler.reset()
    PyCodeCache.cache_clear()
    memory.release()


def ratios(times: Mapping[str, float]) -> dict[str, Any]:
    """The best peer, and ai3's times over its time; None for what was not measured."""
    others = {name: time for name, time in times.items() if name not in RATIOS.values()}
    best = min(others, key=others.__getitem__, default=None)
    return {
        "best peer": best,
        **{key: times[side] / times[best] if best and side in times else None for key, side in RATIOS.items()},
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Geometric means of both ratios, for each batch and overall."""
    batches = {f"batch {row['batch']}": row["batch"] for row in rows}
    return {
        label: {
            key: timing.geometric_mean(r[key] for r in rows if batch in (None, r["batch"]) and r[key] is not None)
            for key in RATIOS
        }
        for label, batch in {**batches, "overall": None}.items()
    }


def finish(result: dict[str, Any]) -> None:
    if is_on_gpu(result):
        gpu_models.finish(result)
        return
    result["geometric mean"] = summary(result["rows"])


def is_on_gpu(result: Mapping[str, Any]) -> bool:
    return result.get("device") == "cuda"


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Times with ratios, errors, and memory."""
    if is_on_gpu(result):
        return gpu_models.tables(result)
    rows, sides = result["rows"], list(result["sides"])
    threads = f"{result['threads']} threads of {result['cpu']} ({result['isa']})"
    header = ["network", "batch", *sides, "best peer", "ai3 / best", "convert / best"]
    times = Table(f"Median milliseconds, {threads}", header)
    for row in rows:
        values = [number(row["milliseconds"].get(side), 1) for side in sides]
        cells = [row["best peer"] or "-", *(number(row[key]) for key in RATIOS)]
        times.rows.append([row["model"], str(row["batch"]), *values, *cells])
    for label, means in result["geometric mean"].items():
        blank = ["" for _ in (*sides, "best peer")]
        times.rows.append(
            ["geometric mean", label.removeprefix("batch "), *blank, *(number(m) for m in means.values())]
        )
    times.notes = [
        f"{name}: {side['not measured']}" for name, side in result["sides"].items() if "not measured" in side
    ]
    said = {note.partition(":")[0] for note in times.notes}
    times.notes += [
        f"{row['model']}, batch {row['batch']}: {side} {reason}"
        for row in rows
        for side, reason in row["not measured"].items()
        if side not in said
    ]
    error = Table("Largest error relative to the largest output, against float64", ["network", "batch", *sides])
    extra = Table("Memory of one call at its peak, MiB", ["network", "batch", *memory.SIDES])
    for row in rows:
        where, errors, mebibytes = [row["model"], str(row["batch"])], row["relative error"], row["extra memory MiB"]
        error.rows.append([*where, *(f"{errors[side]:.1e}" if side in errors else "-" for side in sides)])
        extra.rows.append([*where, *(number(mebibytes.get(side), 1) for side in memory.SIDES)])
    if not any(row["extra memory MiB"] for row in rows):
        return [times, error]
    return [times, error, extra]
