"""The tiles of the implicit GEMM, each run by itself (ai3_run_tile), whatever the model of their time would choose:
on a GPU (cuda/test_tiles.py), and without one (cpu/test_cuda_emulated_sm90.py)."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ai3_compile import registry
from ai3_compile.backends import abi
from ai3_compile.errors import KernelMemoryError
from ai3_compile.ops import activations
from ai3_compile.testing import calls, harness, references
from ai3_compile.testing.cases import Conv

ALGORITHM = registry.find("conv2d", "implicit gemm@cuda")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
# Sums end from registers, with a residual too, and through shared memory where an activation is not a clamp.
VARIANTS = ("bias, relu", "bias, residual, relu", "bias, residual, silu")
_MOST_TILES = 32


def call_of(case: Conv, dtype: str, variant: str, device: str) -> calls.Call:
    has_residual = "residual" in variant
    made = calls.conv2d(case, torch.float32, variant if has_residual else "bias, residual, relu")
    made = calls.in_dtype(made, DTYPES[dtype], device)
    return made if has_residual else dataclasses.replace(made, residual=None)


def judged(
    library: ctypes.CDLL,
    table_with: Callable[[Callable[[abi.Args], None]], Any],
    call: calls.Call,
    dtype: str,
    shares: Sequence[int],
    expected: torch.Tensor | None = None,
    **how: Any,
) -> tuple[set[tuple[str, int]], list[str]]:
    """The names and shares of the depth of the tiles that compute a call, and what is wrong with them. `table_with`
    gives the algorithm's table with another run(); `expected` is what PyTorch computes if it is not given."""
    run_tile = library.ai3_run_tile
    run_tile.argtypes, run_tile.restype = [ctypes.POINTER(abi.Args), ctypes.c_int32, ctypes.c_int32], ctypes.c_char_p
    expected = call.compute(torch.float64) if expected is None else expected
    limit = 2e-3 if dtype == "tf32" else references.bound("conv2d", ALGORITHM.name, call.spec.dtype, call.terms)
    number, computed, found = activations.NUMBERS[call.activation], set(), []
    for tile, count in itertools.product(range(_MOST_TILES), shares):
        names = []

        def run(args: abi.Args) -> None:
            name = run_tile(args, tile, count)  # noqa: B023
            names.extend([] if name is None else [name.decode()])  # noqa: B023

        error: str | None
        try:
            how |= {"layout": abi.NHWC, "allow_tf32": dtype == "tf32"}
            output = harness.run_kernel(table_with(run), call.spec, *call.tensors, number, **how)
            error = references.judge(output, expected, limit)[1]
        except (KernelMemoryError, RuntimeError) as raised:
            error = str(raised)
            if isinstance(raised, KernelMemoryError) and not names:
                continue  # there is no such tile, and nothing is written
        name = names[0] if names else f"tile {tile}"
        computed.add((name, count))
        found += [] if error is None else [f"{name}, {count} shares: {error}"]
    return computed, found
