"""The tiles of the implicit GEMM that only Hopper's instructions compute, on the CPU (tests/emulation), through the C
ABI, against float64. tests/cuda/test_tiles.py runs them on a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable

import pytest
import torch

from ai3_compile.backends import abi
from ai3_compile.ops import activations
from ai3_compile.testing import calls
from ai3_compile.testing.cases import NONE, Conv
from tests import emulation, gpu_tiles
from tests.gpu_cases import behind_a_norm

pytestmark = [
    pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable())),
    pytest.mark.usefixtures("one_thread"),
]

# Of ai3/cuda.h; bfloat16 is float16's code with another type.
PARTS = {"float16": 1, "tf32": 3, "float32": 4}
# Blocks of depth are of 64 channels, in float32 of 32; a GPU has three multiprocessors here.
CASES = (
    Conv("patches-equal", 64, (8, 16), 64),
    Conv("patches-above", 40, (9, 17), 72),
    Conv("window-1x7", 64, (9, 10), 40, (1, 7)),
    Conv("dilation", 64, (12, 11), 40, dilation=(2, 1)),
    Conv("groups", 128, (9, 5), 64, groups=2),
    Conv("stride", 64, (13, 12), 72, stride=(2, 2), batch=2),
    Conv("matrix", 264, (5, 4), 136, (1, 1), batch=2, padding=NONE),
    Conv("shallow-below", 24, (5, 7), 40, (1, 1), batch=3, padding=NONE),
    Conv("shallow-many-tiles-a-block", 40, (31, 29), 136, (1, 1), padding=NONE),
    Conv("few-rows-below", 24, (1, 1), 40, (1, 1), batch=3, padding=NONE),
    Conv("few-rows-many-blocks", 1096, (1, 1), 72, (1, 1), batch=17, padding=NONE),
)
POOLED = (Conv("pooled-equal", 64, (8, 16), 64), Conv("pooled-above", 72, (10, 19), 72))
NORMED = (
    Conv("normed-below", 40, (5, 7), 24, (1, 1), padding=NONE),
    Conv("normed-above", 136, (9, 10), 72, (1, 1), padding=NONE),
)
# Whose sums end without a residual, and through shared memory, too.
EVERY_END = (
    *("patches-equal", "matrix", "shallow-below", "few-rows-below"),
    *("shallow-many-tiles-a-block", "few-rows-many-blocks"),
)
# Copies at once, and as late as they may be, the first, the last or any of them first.
ORDERS = ((0, True), (0, False), (1, False), (2, False))
KINDS = ("bulk", "halo", "resident", "thin", "stream", "prologue")
ran: set[tuple[str, str]] = set()


@pytest.fixture(scope="module", params=PARTS)
def emulated(request):
    found = emulation.load_hopper(gpu_tiles.ALGORITHM, PARTS[request.param])
    return request.param, dataclasses.replace(found, allow_tf32=request.param == "tf32")


@dataclasses.dataclass
class WithRun(emulation.Emulated):
    other_run: Callable[[abi.Args], None] | None = None

    def run(self, args: abi.Args) -> None:
        assert self.other_run is not None
        self.other_run(self.on_gpu(args))


def call_of(case: Conv, dtype: str, variant: str) -> calls.Call:
    call = gpu_tiles.call_of(case, dtype, variant, "cpu")
    call.input[call.input.isnan()] = torch.nan  # the CPU makes some of all ones, which is what unwritten memory holds
    return call


def judged(table: emulation.Emulated, dtype: str, call: calls.Call, **how: object) -> tuple[set[tuple[str, int]], list]:
    fields = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    orders = itertools.cycle(ORDERS[len(call.spec.name) % len(ORDERS) :] + ORDERS)

    def with_run(run: Callable[[abi.Args], None]) -> WithRun:
        table.set_order(*next(orders))
        return WithRun(**fields, other_run=run)

    return gpu_tiles.judged(table.library, with_run, call, dtype, (1, 4), **how)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_tile(case, emulated):
    dtype, table = emulated
    for variant in gpu_tiles.VARIANTS if case.id in EVERY_END else gpu_tiles.VARIANTS[1:2]:
        call = call_of(case, dtype, variant)
        computed, found = judged(table, dtype, call)
        assert not found, "\n".join([variant, *found[:8]])
        kinds = {name.split("_")[-1] for name, _ in computed}
        assert "bulk" in kinds
        is_tall, is_float32 = case.kernel != (1, 1), dtype == "float32"
        assert ("halo" in kinds) == (is_tall and case.stride == (1, 1) and not is_float32)
        assert ("thin" in kinds) == (not is_tall and not is_float32 and case.batch * case.size[0] * case.size[1] <= 64)
        if case.id.startswith("shallow"):
            assert ("stream" in kinds) == (not is_float32 and call.activation == "relu")
    ran.add((dtype, case.id))


@pytest.mark.parametrize("case", POOLED, ids=lambda case: case.id)
def test_every_tile_that_pools(case, emulated):
    dtype, table = emulated
    call = call_of(case, dtype, "bias, relu")
    expected = torch.nn.functional.max_pool2d(call.compute(torch.float64), 2)
    computed, found = judged(table, dtype, call, expected=expected, pools=True)
    assert not found, "\n".join(found[:8])
    assert bool(computed) == (dtype != "float32")
    ran.add((dtype, case.id))


@pytest.mark.parametrize("case", NORMED, ids=lambda case: case.id)
def test_every_tile_behind_a_norm(case, emulated):
    dtype, table = emulated
    call = dataclasses.replace(call_of(case, dtype, "bias, relu"), activation="identity")
    scale, shift, expected = behind_a_norm(call, 0.0)
    prologue = scale, shift, activations.NUMBERS["relu"]
    computed, found = judged(table, dtype, call, expected=expected, prologue=prologue)
    # What is read is rounded once more than without it.
    assert not found, "\n".join(found[:8])
    assert computed and all(name.endswith("_prologue") for name, _ in computed)
    ran.add((dtype, case.id))


def test_every_kernel_has_run(emulated):
    """All but those that other GPUs have too."""
    dtype, table = emulated
    if not {(dtype, case.id) for case in (*CASES, *POOLED, *NORMED)} <= ran:
        pytest.skip("needs the other tests of this file, in this process")
    times = {name: count for name, count in table.launches().items() if name.split("_")[-1] in KINDS}
    assert times and [name for name, count in times.items() if count == 0] == []


BY_NAME = {case.id: case for case in (*CASES, *POOLED, *NORMED)}
# What a kernel is made to do wrong in TF32, a case of silu that shows it, and what is then said.
CHANGES = {
    "thin-wait": (
        ("wait_barrier(full + slot * 8, i / p.slots % 2);", ""),
        ("few-rows-many-blocks", "a copy is still to write"),
    ),
    "stream-store": (("wait_stores();", ""), ("shallow-many-tiles-a-block", "from shared memory is not waited for")),
    "stream-release": (
        ("arrive(empty + slot * 8);", ""),
        ("shallow-many-tiles-a-block", "nothing arrives at"),
    ),
    "stream-barrier": (
        ('asm volatile("bar.sync %0, 128;" ::"r"(team + 1) : "memory");\n    if', "if"),
        ("shallow-many-tiles-a-block", "warp . writes, and nothing puts them in order"),
    ),
    "halo-barrier": (
        ('asm volatile("bar.sync 1, %0;" ::"n"(Warps * 32) : "memory");\n      }\n      bool', "}\n      bool"),
        ("patches-equal", "warp . writes, and nothing puts them in order"),
    ),
    "stream-fence": (("fence_shared();", ""), ("shallow-below", "without a fence between")),
    # The products of the block that is given back may not be done.
    "halo-wait": (
        ("wgmma_wait<1>();\n          if (is_pending)", "wgmma_wait<2>();\n          if (is_pending)"),
        ("patches-equal", "a copy is still to write|error"),
    ),
    "resident-wait": (
        ("wgmma_wait<0>();\n      __syncwarp();", "__syncwarp();"),
        ("patches-equal", "a product is not waited for"),
    ),
    "bulk-bytes": (
        ("(Rows + kParts * columns) * 128)", "(Rows + kParts * columns) * 128 + 16)"),
        ("matrix", "that nothing arrives at"),
    ),
    "bulk-barriers": (
        ("full = base + p.barriers", "full = base + p.slots * kStageBytes"),
        ("shallow-below", "written where a barrier is|whose memory was written"),
    ),
    "cluster-end": (
        ("if (gridDim.z > 1) cluster_barrier();", ""),
        ("matrix", "that has ended|is still to write|error"),
    ),
}


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    changes = {name: (gpu_tiles.ALGORITHM, *change) for name, (change, _) in CHANGES.items()}
    folder = tmp_path_factory.mktemp("changed")
    found = emulation.load_changed(changes, folder, emulation.of_hopper(PARTS["tf32"]))
    return {name: dataclasses.replace(table, sm=90, allow_tf32=True) for name, table in found.items()}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_wrong_is_seen(name, changed):
    case, said = CHANGES[name][1]
    found: list[str] = []
    for variant in gpu_tiles.VARIANTS[1:]:
        found = found or judged(changed[name], "tf32", call_of(BY_NAME[case], "tf32", variant))[1]
    assert any(re.search(said, problem) for problem in found), found[:3]
