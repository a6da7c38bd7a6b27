"""Every tile of the implicit GEMM on layers of networks, on a GPU, beside what the model of their time estimates.

It tells whether the tile that the model chooses is the fastest, and is what the model's rates are fitted to
(`python -m bench fit`).
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ai3_compile import registry
from ai3_compile.backends import abi, builder, native
from ai3_compile.errors import KernelMemoryError
from ai3_compile.ops import activations
from ai3_compile.testing import calls, harness
from ai3_compile.testing.cases import NONE, Conv

from . import gpu
from .table import Table, number

ROUNDS = 5
PRECISIONS = ("tf32", "fp16")
BATCH = 10
POOLED, RESIDUAL = "pool", "residual"
# Channels, side, filters, and what is computed with it. Of networks, and some between, of sides that no tile divides.
Layer = tuple[int, int, int, str]
GROUPS: dict[str, tuple[Layer, ...]] = {
    "3x3": (
        (32, 112, 32, ""),
        (32, 149, 64, ""),
        (48, 80, 96, ""),
        (64, 224, 64, ""),
        (64, 224, 64, POOLED),
        (64, 112, 128, ""),
        (64, 56, 64, ""),
        (64, 28, 64, ""),
        (64, 28, 64, POOLED),
        (64, 35, 96, ""),
        (96, 35, 96, ""),
        (128, 112, 128, POOLED),
        (128, 56, 256, ""),
        (128, 28, 128, ""),
        (192, 17, 224, ""),
        (256, 56, 256, ""),
        (256, 56, 256, POOLED),
        (256, 14, 256, ""),
        (256, 14, 256, POOLED),
        (512, 28, 512, ""),
        (512, 28, 512, POOLED),
        (512, 14, 512, ""),
        (512, 7, 512, ""),
    ),
    "1x1": (
        (64, 56, 64, ""),
        (64, 56, 256, ""),
        (64, 56, 256, RESIDUAL),
        (256, 56, 64, ""),
        (256, 56, 128, ""),
        (128, 28, 512, RESIDUAL),
        (512, 28, 128, ""),
        (512, 28, 256, ""),
        (256, 14, 1024, RESIDUAL),
        (1024, 14, 256, ""),
        (1024, 14, 512, ""),
        (512, 7, 2048, RESIDUAL),
        (2048, 7, 512, ""),
    ),
    "linear": (
        (25088, 1, 4096, ""),
        (9216, 1, 4096, ""),
        (4096, 1, 4096, ""),
        (4096, 1, 1000, ""),
        (2048, 1, 1000, ""),
    ),
}
_DTYPES = {"tf32": torch.float32, "fp16": torch.float16}
_MOST_TILES, _SPLITS = 32, (1, 2, 4, 8)


class Described(ctypes.Structure):
    """ai3_tile of conv2d/implicit_gemm.cu."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("rates", ctypes.POINTER(ctypes.c_double)),
        ("rate_count", ctypes.c_int32),
        ("shared", ctypes.c_int32),
        ("time", ctypes.c_double),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=tuple(GROUPS), help="of layers")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)


def describe(given: argparse.Namespace) -> dict[str, object]:
    return {
        **gpu.describe(),
        "device": "cuda",
        "precisions": list(given.precision),
        "microseconds": f"medians, of calls behind one another, at batch {BATCH}, with a bias and ReLU",
        "estimate": "by gemm_time.cuh: the tile of the lowest is chosen",
    }


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each layer and precision: the microseconds of every tile that may compute it."""
    algorithm, library = implicit_gemm()
    registry.platforms()["cuda"].load([algorithm])
    table = abi.Kernel.from_buffer_copy(harness.table_of(algorithm))
    for precision, group in itertools.product(given.precision, given.groups):
        for layer in GROUPS[group]:
            print(f"{title(group, layer)} {precision}", file=sys.stderr, flush=True)
            yield {
                "group": group,
                "layer": list(layer),
                "precision": precision,
                "tiles": _measured(table, library, group, layer, precision, given.rounds),
            }


def title(group: str, layer: Sequence[Any]) -> str:
    channels, side, filters, with_it = layer
    return " ".join(filter(None, [group, f"{BATCH}x{channels}x{side}x{side}", str(filters), with_it]))


def implicit_gemm() -> tuple[registry.Algorithm, ctypes.CDLL]:
    """The algorithm and its library, with the functions that it has beside its table."""
    algorithm = registry.find("conv2d", "implicit gemm@cuda")
    (path,) = builder.build_many([registry.platforms()["cuda"].request(algorithm)])
    library, args = ctypes.CDLL(str(path)), ctypes.POINTER(abi.Args)
    library.ai3_run_tile.argtypes, library.ai3_run_tile.restype = [args, *[ctypes.c_int32] * 2], ctypes.c_char_p
    rates, described = ctypes.POINTER(ctypes.c_double), ctypes.POINTER(Described)
    library.ai3_describe_tile.argtypes = [args, ctypes.c_int32, ctypes.c_int32, rates, described]
    return algorithm, library


def tiles_of(library: ctypes.CDLL, args: Any) -> dict[tuple[int, int], Described]:
    """By their number and the splits of the depth, the tiles that may compute a call."""
    found = {}
    for tile, splits in itertools.product(range(_MOST_TILES), _SPLITS):
        described = Described()
        if library.ai3_describe_tile(args, tile, splits, None, described):
            found[tile, splits] = described
    return found


def _measured(
    table: abi.Kernel, library: ctypes.CDLL, group: str, layer: Layer, precision: str, rounds: int
) -> list[dict[str, Any]]:
    call = _call(group, layer, precision, "cuda")
    found: list[dict[str, Any]] = []
    failures: list[BaseException] = []

    def run(args: Any) -> None:
        try:
            tiles = tiles_of(library, args)
            sides = {str(key): functools.partial(library.ai3_run_tile, args, *key) for key in tiles}
            seconds = gpu.medians(sides, rounds)
            found.extend(
                {
                    "tile": described.name.decode(),
                    "splits": key[1],
                    "microseconds": seconds[str(key)] * 1e6,
                    "estimate": described.time / 1e3,
                    "shared memory": described.shared,
                }
                for key, described in tiles.items()
            )
        except BaseException as error:  # ctypes would print it and go on
            failures.append(error)

    table.run = type(table.run)(run)
    number_of = activations.NUMBERS[call.activation]
    how = {"layout": abi.NHWC, "allow_tf32": precision == "tf32", "pools": layer[3] == POOLED}
    try:
        harness.run_kernel(table, call.spec, *call.tensors, number_of, **how)
    except KernelMemoryError:
        if not failures:
            raise
    if failures:
        raise failures[0]
    return found


def _call(group: str, layer: Sequence[Any], precision: str, device: str) -> calls.Call:
    channels, side, filters, with_it = layer
    kernel, padding = ((3, 3), (1, 1, 1, 1)) if group == "3x3" else ((1, 1), NONE)
    case = Conv(title(group, layer), channels, (side, side), filters, kernel, batch=BATCH, padding=padding)
    call = calls.in_dtype(calls.conv2d(case, torch.float32, "bias, residual, relu"), _DTYPES[precision], device)
    return call if with_it == RESIDUAL else dataclasses.replace(call, residual=None)


def arguments(row: Mapping[str, Any]) -> abi.Args:
    """What a row was measured with, as far as the model asks: on a GPU of compute capability 9.0, without tensors."""
    with torch.device("meta"):
        call = _call(row["group"], row["layer"], row["precision"], "meta")
    args = native.args_of(call.spec, abi.NHWC)
    args.sm, args.activation = 90, activations.NUMBERS[call.activation]
    args.allow_tf32, args.pools = row["precision"] == "tf32", row["layer"][3] == POOLED
    args.has_bias, args.has_residual = 1, call.residual is not None
    return args


def chosen_and_fastest(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tile of the lowest estimate and that of the lowest time."""
    chosen, fastest = (min(row["tiles"], key=lambda tile: tile[by]) for by in ("estimate", "microseconds"))
    return chosen, fastest


def finish(result: dict[str, Any]) -> None:
    """What the choice costs: the geometric mean of the chosen tile's time over the fastest one's."""
    result["chosen over fastest"] = {}
    for precision in result["precisions"]:
        pairs = [chosen_and_fastest(row) for row in result["rows"] if row["precision"] == precision]
        if pairs:
            losses = [chosen["microseconds"] / fastest["microseconds"] for chosen, fastest in pairs]
            result["chosen over fastest"][precision] = statistics.geometric_mean(losses)


def tables(result: Mapping[str, Any]) -> list[Table]:
    table = Table(
        f"Tiles of the implicit GEMM, microseconds ({gpu.where(result)})",
        ["layer", "chosen", "estimated", "takes", "fastest", "takes", "chosen over fastest"],
    )
    for row in result["rows"]:
        chosen, fastest = chosen_and_fastest(row)
        names = [f"{tile['tile']}/{tile['splits']}" for tile in (chosen, fastest)]
        times = [number(value, 1) for value in (chosen["estimate"], chosen["microseconds"], fastest["microseconds"])]
        ratio = number(chosen["microseconds"] / fastest["microseconds"])
        label = f"{title(row['group'], row['layer'])} {row['precision']}"
        table.rows.append([label, names[0], *times[:2], names[1], times[2], ratio])
    for precision, loss in result["chosen over fastest"].items():
        table.notes.append(f"geometric mean of chosen over fastest, {precision}: {number(loss, 3)}")
    return [table]
