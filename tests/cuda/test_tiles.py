"""Every tile of the implicit GEMM, with its depth in any number of shares, whichever the model of their time chooses.

Sums end with a bias and a ReLU from registers, with a residual too, and with a SiLU through shared memory.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from ai3_compile import registry
from ai3_compile.backends import builder
from ai3_compile.testing import calls, harness
from ai3_compile.testing.cases import NONE, Conv
from tests import gpu_tiles

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Tiles of images are of 8x16, 16x16 and fewer pixels; blocks of depth of 64 channels, in float32 of 32.
CASES = (
    Conv("image-equal", 64, (16, 16), 64, batch=2),
    Conv("image-below", 72, (7, 9), 40, batch=3),
    Conv("image-above", 128, (17, 33), 136, padding=(0, 2, 1, 1)),
    Conv("image-divides", 64, (32, 48), 128),
    Conv("window-5x5", 192, (24, 15), 64, (5, 5)),
    Conv("window-1x7", 64, (18, 18), 192, (1, 7), batch=2),
    Conv("dilation", 64, (33, 20), 64, dilation=(2, 3)),
    Conv("groups", 128, (19, 17), 96, batch=2, groups=2),
    Conv("stride", 64, (31, 30), 72, stride=(2, 2), batch=2),
    Conv("matrix", 264, (15, 14), 72, (1, 1), batch=2, padding=NONE),
    Conv("shallow-equal", 32, (8, 8), 64, (1, 1), padding=NONE),
    Conv("shallow-below", 24, (5, 7), 40, (1, 1), batch=3, padding=NONE),
    Conv("shallow-above", 72, (17, 9), 136, (1, 1), padding=NONE),
    Conv("few-rows-below", 24, (1, 1), 40, (1, 1), batch=3, padding=NONE),
    Conv("few-rows-equal", 512, (1, 1), 64, (1, 1), batch=16, padding=NONE),
    Conv("few-rows-above", 1032, (1, 1), 1000, (1, 1), batch=17, padding=NONE),
    Conv("few-rows-deep", 8192, (1, 1), 2048, (1, 1), batch=10, padding=NONE),
    Conv("shallow-many-tiles-a-block", 40, (61, 59), 1096, (1, 1), batch=2, padding=NONE),
)
# Those whose weights are few enough to stay in shared memory, and those that are in half as many bytes.
RESIDENT = {"tf32": ("image-equal", "image-divides", "groups", "window-1x7")}
RESIDENT["float16"] = RESIDENT["bfloat16"] = (*RESIDENT["tf32"], "image-below", "image-above", "dilation")


@pytest.fixture(scope="module")
def library():
    platform = registry.platforms()["cuda"]
    platform.load([gpu_tiles.ALGORITHM])
    (path,) = builder.build_many([platform.request(gpu_tiles.ALGORITHM)])
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", gpu_tiles.DTYPES)
@pytest.mark.parametrize("variant", gpu_tiles.VARIANTS)
def test_every_tile(case, dtype, variant, library):
    made = gpu_tiles.call_of(case, dtype, variant, "cuda")
    computed = judged(made, dtype, library)
    assert {splits for _, splits in computed} >= {1}
    if torch.cuda.get_device_capability() == (9, 0):
        tiles = {name for name, _ in computed}
        has_halo = dtype != "float32" and case.stride == (1, 1) and case.kernel != (1, 1)
        assert any(name.endswith("_halo") for name in tiles) == has_halo, tiles
        is_clamp = dtype != "float32" and made.activation == "relu"
        assert ("128x64_resident" in tiles) == (is_clamp and case.id in RESIDENT[dtype]), tiles
        is_few = dtype != "float32" and case.kernel == (1, 1) and case.batch * math.prod(case.size) <= 64
        assert ("16x64_thin" in tiles) == is_few, tiles
        is_shallow = dtype != "float32" and made.activation == "relu" and case.id.startswith("shallow")
        if is_shallow or case.kernel != (1, 1) or made.activation != "relu":
            assert ("64x64_stream" in tiles) == is_shallow, tiles
        most = 1 if case.channels < 128 and case.kernel == (1, 1) else 4
        assert {splits for _, splits in computed} >= {splits for splits in (1, 2, 4) if splits <= most}


@pytest.mark.parametrize("case", [case for case in CASES if case.size != (1, 1)], ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", gpu_tiles.DTYPES)
def test_every_tile_that_pools(case, dtype, library):
    computed = judged(gpu_tiles.call_of(case, dtype, "bias, relu", "cuda"), dtype, library, pools=True)
    has_halo = dtype != "float32" and case.stride == (1, 1) and case.kernel != (1, 1)
    if torch.cuda.get_device_capability() == (9, 0) and has_halo:
        tiles = {"128x64_halo", "128x128_halo", "256x64_halo", "256x128_halo"}
        tiles |= {"128x64_resident"} if case.id in RESIDENT[dtype] else set()
        assert computed == {(name, 1) for name in tiles}
    else:
        assert not computed


@pytest.mark.parametrize("dtype", ["float16", "tf32"])
def test_the_largest_of_four_is_nan_where_one_is(dtype, library):
    made = gpu_tiles.call_of(CASES[0], dtype, "bias, relu", "cuda")
    made.tensors[0][1, :, 5, 6] = float("nan")
    judged(made, dtype, library, pools=True)


def judged(made: calls.Call, dtype: str, library: ctypes.CDLL, pools: bool = False) -> set[tuple[str, int]]:
    """The names and shares of the tiles that computed it, each within the bound."""
    expected = made.compute(torch.float64)
    if pools:
        expected = torch.nn.functional.max_pool2d(expected, 2)
    table = harness.abi.Kernel.from_buffer_copy(harness.table_of(gpu_tiles.ALGORITHM))

    def with_run(run):
        table.run = type(table.run)(run)
        return table

    computed, found = gpu_tiles.judged(library, with_run, made, dtype, (1, 2, 4, 8), expected, pools=pools)
    assert not found, "\n".join(found[:8])
    return computed
