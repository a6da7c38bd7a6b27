"""The first layer's CUDA kernels on the CPU (tests/emulation): an image by rows, pixels and patches, against float64.

Bounds as in test_cuda_emulated.py, whose cases these kernels compute too.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ai3_compile import registry
from ai3_compile.backends import abi
from ai3_compile.ops import activations
from ai3_compile.testing import calls, harness, references
from ai3_compile.testing.cases import NONE, Conv
from tests import emulation
from tests.gpu_cases import IMAGES, PATCHES

pytestmark = pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable()))

ALGORITHM = registry.find("conv2d", "implicit gemm@cuda")
BOUNDS = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 2e-3}  # of float32 in TF32
MATHS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "tf32"}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
# By pixels: what a row has is no whole part, an output pixel begins within a word, or the taps are apart.
BY_PIXELS = (
    Conv("image-of-odd-rows", 3, (17, 27), 12, (5, 5), stride=(2, 2)),
    Conv("image-of-odd-steps", 3, (12, 16), 12, stride=(1, 1)),
    Conv("image-of-taps-apart", 3, (16, 24), 12, stride=(2, 2), dilation=(1, 2), padding=NONE),
)


@pytest.fixture(scope="module")
def table():
    return dataclasses.replace(emulation.load([ALGORITHM])[ALGORITHM], allow_tf32=True)


def made(case: Conv, dtype: torch.dtype, variant: str = calls.EPILOGUE) -> calls.Call:
    return calls.in_dtype(calls.conv2d(case, torch.float32, variant), dtype, "cpu")


def computed(table: emulation.Emulated, call: calls.Call) -> torch.Tensor:
    return harness.run_kernel(table, call.spec, *call.tensors, activations.NUMBERS[call.activation], abi.NHWC)


def launched(table: emulation.Emulated, call: calls.Call) -> set[str]:
    before = table.launches()
    computed(table, call)
    return {name for name, count in table.launches().items() if count != before.get(name, 0)}


@DTYPES
def test_which_kernel_computes_an_image(dtype, table):
    words = dtype == torch.float32  # each element is one
    for case in (*IMAGES, *BY_PIXELS):
        by_rows = case in IMAGES or (words and case.id == "image-of-odd-steps")
        kernel = f"few_{'rows' if by_rows else 'pixels'}_{MATHS[dtype]}"
        assert launched(table, made(case, dtype)) == {f"few_pack_{'tf32' if words else 'float16'}", kernel}, case.id
    for case in PATCHES:
        packs = f"gemm_pack_{'tf32' if words else 'float16'}"
        assert launched(table, made(case, dtype)) == {packs, f"gemm_{MATHS[dtype]}_64x64"}, case.id
        odd = dataclasses.replace(case, size=(case.size[0], case.size[1] + 1))
        assert launched(table, made(odd, dtype)) == {packs, f"gemm_{MATHS[dtype]}_64x64_gather"}, case.id


@DTYPES
@pytest.mark.parametrize("case", (*IMAGES, *BY_PIXELS), ids=lambda case: case.id)
def test_what_is_no_number_stays_in_its_windows(case, dtype, table):
    """Words that begin or end outside of a row of the window are read, and have no share in a sum."""
    y, x = (size // 2 for size in case.size)
    for value, *place in (
        (torch.inf, -1, y, x),
        (torch.inf, -1, y, x + 1),
        (torch.nan, 0, y, x),
        (torch.nan, -1, -1, -1),
    ):
        call = made(case, dtype, calls.PLAIN)
        call.input[(-1, *place)] = value
        expected = call.compute(torch.float64)
        output, whole = computed(table, call), expected.isfinite()
        assert torch.equal(output.isfinite(), whole)
        error = (output.double() - expected)[whole].norm() / expected[whole].norm()
        assert error < BOUNDS[dtype]


@DTYPES
@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.id)
def test_an_image_anywhere_in_memory(case, dtype, table, monkeypatch):
    class ByOneElement(harness.Guarded):
        def __init__(self, name: str, size: int, device: torch.device | str = "cpu") -> None:
            by = dtype.itemsize if name == "input" else 0
            super().__init__(name, size + by, device)
            self.bytes[self.start : self.start + by] = harness.PATTERN
            self.start, self.address, self.size = self.start + by, self.address + by, size

    monkeypatch.setattr(harness, "Guarded", ByOneElement)
    call = made(case, dtype)
    assert references.judge(computed(table, call), call.compute(torch.float64), BOUNDS[dtype])[1] is None
