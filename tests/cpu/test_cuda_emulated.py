"""ai3's own CUDA kernels on the CPU (tests/emulation), through the C ABI, against float64; products of tensor cores by
the instructions of sm_80. tests/cuda/test_kernels.py runs them on a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import re

import pytest
import torch

from ai3_compile import registry
from ai3_compile.backends import abi
from ai3_compile.ops import activations
from ai3_compile.ops.activations import ACTIVATIONS
from ai3_compile.testing import calls, cases, harness, references
from tests import emulation
from tests.gpu_cases import CONVS, LARGE, POINTWISE, POOLS, behind_a_norm

pytestmark = [
    pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable())),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
# As in tests/cuda/test_kernels.py.
HALVES = {torch.float16: 6e-4, torch.bfloat16: 5e-3}
TF32 = 2e-3
# Attention's calls are others: test_cuda_attention.py.
ALGORITHMS = [a for a in registry.algorithms() if a.platform == "cuda" and a.operation != "attention"]
MATMUL = ("conv2d", "linear")
SLICED = [a for a in ALGORITHMS if a.operation == "conv2d"]
# The algorithms that compute every case of their operation, in every dtype.
WHOLE = {("conv2d", "direct"), ("conv2d", "smm"), ("linear", "gemm")} | {
    (operation, "direct") for operation in ("maxpool2d", "avgpool2d", "adaptiveavgpool2d", "relu", "flatten")
}
ALLOWING_TF32 = {("conv2d", "implicit gemm"), ("linear", "gemm"), ("linear", "direct")}


@pytest.fixture(scope="module")
def emulated():
    return emulation.load([*ALGORITHMS, registry.EPILOGUE])


def bound(algorithm: registry.Algorithm, dtype: torch.dtype, tf32: bool, terms: int) -> float:
    operation = algorithm.operation
    if operation in references.EXACT:
        return 0.0
    if dtype in HALVES:
        return HALVES[dtype]
    return TF32 if tf32 else references.bound(operation, algorithm.name, dtype, terms)


def in_dtype(call: calls.Call, dtype: torch.dtype) -> calls.Call:
    """As calls.in_dtype, with the usual NaNs: the CPU makes some of all ones, which is what unwritten memory holds."""
    moved = calls.in_dtype(call, dtype, "cpu")
    moved.input[moved.input.isnan()] = torch.nan
    return moved


def layouts(table: emulation.Emulated, call: calls.Call) -> list[int | None]:
    if call.spec.operation not in calls.IMAGES:
        return [None]
    return [layout for layout in (abi.NCHW, abi.NHWC) if table.flags & layout]


def supported(table: emulation.Emulated, call: calls.Call, layout: int | None) -> str | None:
    return table.supports(harness.native.args_of(call.spec, table.flags if layout is None else layout))


def wrong(
    algorithm: registry.Algorithm, table: emulation.Emulated, call: calls.Call, own_layouts: bool = True, **how: object
) -> tuple[int, list[str]]:
    """On how many layouts the algorithm computed the call, and what was wrong."""
    found, computed, expected = [], 0, None
    limit = bound(algorithm, call.spec.dtype, table.allow_tf32, call.terms)
    for layout in layouts(table, call) if own_layouts else [abi.NHWC]:
        reason = supported(table, call, layout)
        if reason is not None:
            if not reason.strip():
                found.append(f"{call.spec.name}: refused without a reason")
            continue
        if expected is None:
            expected = call.compute(torch.float64)
        error: str | None
        try:
            number = activations.NUMBERS[call.activation]
            output = harness.run_kernel(table, call.spec, *call.tensors, number, layout, **how)
            error = references.judge(output, expected, limit)[1]
        except (harness.KernelMemoryError, RuntimeError) as raised:
            error = str(raised)
        computed += 1
        if error is not None:
            found.append(f"{call.spec.name} {call.spec.dtype} {call.variant} layout {layout} {how or ''}: {error}")
    return computed, found


def calls_of(operation: str, dtype: torch.dtype, variant: str):
    yield from calls.plain_calls(operation, dtype, variant)
    if operation == "conv2d":
        yield from (calls.conv2d(case, dtype, variant) for case in CONVS)
    elif operation in ("maxpool2d", "avgpool2d"):
        yield from (calls.pool(operation, case, dtype) for case in POOLS)


ran = set()


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{a.operation}-{a.name}")
@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"])
def test_every_case(algorithm, dtype, emulated):
    tf32 = dtype == "tf32"
    if tf32 and (algorithm.operation, algorithm.name) not in ALLOWING_TF32:
        return
    table, kind = dataclasses.replace(emulated[algorithm], allow_tf32=tf32), DTYPES.get(dtype, torch.float32)
    made = torch.float64 if kind == torch.float64 else torch.float32
    computed, missing, found = 0, 0, []
    variants = [calls.PLAIN]
    if algorithm.operation in MATMUL:
        variants = [calls.PLAIN, calls.EPILOGUE] if dtype == "float32" else [calls.EPILOGUE]
    for variant in variants:
        for number, call in enumerate(calls_of(algorithm.operation, made, variant)):
            table.set_order(emulation.ORDERS[number % 3], early=number % 2 == 0)
            times, problems = wrong(algorithm, table, in_dtype(call, kind))
            computed, missing = computed + times, missing + (times == 0)
            found += problems
    assert not found, "\n".join(found[:8])
    if (algorithm.operation, algorithm.name) in WHOLE:
        assert computed and not missing, f"{missing} cases refused"
    ran.add((algorithm, dtype))


@pytest.mark.parametrize(("operation", "name"), LARGE)
def test_work_that_fills_a_gpu(operation, name, emulated):
    """The kernels that are chosen for it, with everything that is added to the result."""
    found = []
    algorithm = registry.find(operation, f"{name}@cuda")
    for dtype, case in LARGE[operation, name]:
        table = dataclasses.replace(emulated[algorithm], allow_tf32=dtype == "tf32")
        make = calls.linear if operation == "linear" else calls.conv2d
        call = in_dtype(make(case, torch.float32, calls.EPILOGUE), DTYPES.get(dtype, torch.float32))
        found += wrong(algorithm, table, call, own_layouts=operation == "linear")[1]
    assert not found, "\n".join(found[:8])
    ran.add((algorithm, "large"))


@pytest.mark.parametrize(
    "algorithm", [a for a in ALGORITHMS if a.operation in MATMUL], ids=lambda a: f"{a.operation}-{a.name}"
)
def test_every_activation(algorithm, emulated):
    found, cases_of = [], [*CONVS[:1]] if algorithm.name == "winograd" else []
    for variant in calls.EPILOGUES:
        for dtype in (torch.float32, torch.float16):
            made = [*calls.few_calls(algorithm.operation, torch.float32, variant)]
            made += [calls.conv2d(case, torch.float32, variant) for case in cases_of]
            for call in made:
                found += wrong(algorithm, emulated[algorithm], in_dtype(call, dtype))[1]
    assert not found, "\n".join(found[:8])
    ran.add((algorithm, "activations"))


@pytest.mark.parametrize("algorithm", SLICED, ids=lambda a: a.name)
def test_slices(algorithm, emulated):
    """Channels of larger images are read and written as they lie; what is beside them is NaN, and stays. A residual
    may lie where the output is written."""
    table, found = emulated[algorithm], []
    names = (
        *cases.FEW_CONVS,
        "divides",
        "stride-2",
        "groups",
        "depthwise-divides",
        "depthwise-5x5-stride",
        CONVS[1].id,
    )
    chosen = [case for case in (*cases.CONVS, *CONVS) if case.id in names]
    slices = [{"beside": (8, 0)}, {"beside": (0, 3)}, {"within": (8, 0)}, {"within": (0, 5)}]
    for dtype in (torch.float32, torch.float16):
        for case in chosen:
            call = in_dtype(calls.conv2d(case, torch.float32, calls.BIAS), dtype)
            for how in slices:
                if table.flags & (abi.STRIDED_OUTPUT if "beside" in how else abi.STRIDED_INPUT):
                    found += wrong(algorithm, table, call, own_layouts=False, **how)[1]
            if table.flags & abi.RESIDUAL_IN_PLACE:
                call = in_dtype(calls.conv2d(case, torch.float32, calls.EPILOGUE), dtype)
                found += wrong(algorithm, table, call, own_layouts=False, in_place=True)[1]
    assert not found, "\n".join(found[:8])


PROLOGUES = [a for a in SLICED if a.name == "implicit gemm"]


@pytest.mark.parametrize("algorithm", PROLOGUES, ids=lambda a: a.name)
@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"])
def test_a_batch_norm_and_a_relu_ahead(algorithm, dtype, emulated):
    table = dataclasses.replace(emulated[algorithm], allow_tf32=dtype == "tf32")
    assert table.flags & abi.PROLOGUE
    kind = DTYPES.get(dtype, torch.float32)
    for case in POINTWISE:
        call = in_dtype(calls.conv2d(case, torch.float64 if kind == torch.float64 else torch.float32, calls.BIAS), kind)
        # What is read is rounded to a half or to TF32 once more than without it.
        limit = 2 * bound(algorithm, kind, table.allow_tf32, call.terms)
        for activation, least, within in (("relu", 0.0, (0, 0)), ("identity", -torch.inf, (8, 3))):
            scale, shift, expected = behind_a_norm(call, least)
            prologue = scale, shift, activations.NUMBERS[activation]
            output = harness.run_kernel(table, call.spec, *call.tensors, 0, abi.NHWC, within=within, prologue=prologue)
            assert references.judge(output, expected, limit)[1] is None, f"{case.id} {activation}"


@pytest.mark.parametrize("algorithm", PROLOGUES, ids=lambda a: a.name)
def test_another_activation_ahead_is_refused(algorithm, emulated):
    args = harness.native.args_of(calls.conv2d(POINTWISE[0], torch.float32).spec, abi.NHWC)
    args.has_prologue, args.prologue_activation = 1, activations.NUMBERS["relu6"]
    assert "ReLU" in (emulated[algorithm].supports(args) or "")


@pytest.mark.parametrize("name", sorted(ALLOWING_TF32), ids="-".join)
def test_tf32_errs_to_either_side(name, emulated):
    """Of positive factors the products would all be too small if what they do not read were cut off: by 2^-12 each."""
    algorithm = registry.find(name[0], f"{name[1]}@cuda")
    table, found = dataclasses.replace(emulated[algorithm], allow_tf32=True), []
    for call in calls.few_calls(name[0], torch.float32, calls.PLAIN):
        call = dataclasses.replace(call, input=call.input.abs(), weight=call.weight.abs())
        if supported(table, call, None) is not None:
            continue
        expected = call.compute(torch.float64)
        inside = expected > 0
        output = harness.run_kernel(table, call.spec, *call.tensors, 0, None).double()
        found.append(((output - expected)[inside] / expected[inside]).mean().item())
    # The mean of some hundred errors of 2^-12 at most, and the sums, which tensor cores truncate at 2^-23.
    assert found and max(abs(mean) for mean in found) < 5e-5


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.operation in MATMUL], ids=lambda a: a.label)
@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
def test_a_gpus_nan_stays_one(algorithm, dtype, emulated):
    """Its bits are all ones but for the sign: rounding must not carry into that."""
    table, kind = dataclasses.replace(emulated[algorithm], allow_tf32=dtype == "tf32"), DTYPES.get(dtype, torch.float32)
    for call in calls.few_calls(algorithm.operation, torch.float32, calls.PLAIN):
        call = in_dtype(call, kind)
        if supported(table, call, None) is not None or call.input.numel() == 0:
            continue
        bits = torch.int32 if kind == torch.float32 else torch.int16
        call.input.view(bits).view(-1)[call.input.numel() // 2] = 0x7FFFFFFF if kind == torch.float32 else 0x7FFF
        expected = call.compute(torch.float64)
        output = harness.run_kernel(table, call.spec, *call.tensors, 0, None)
        # A transform spreads it over its tile.
        assert bool(output[expected.isnan()].isnan().all()) and bool(expected.isnan().any())


def test_winograd_in_several_launches(emulated):
    """Where the workspace may hold but some of the tiles, which then begin within an image."""
    algorithm = registry.find("conv2d", "winograd@cuda")
    table, found = dataclasses.replace(emulated[algorithm], max_workspace=0), []
    for case in (CONVS[1], *(case for case in cases.CONVS if case.id == "batch-17")):
        before = sum(table.launches().values())
        found += wrong(algorithm, table, calls.conv2d(case, torch.float32, calls.EPILOGUE))[1]
        weights, once = 1, 3
        assert sum(table.launches().values()) - before >= weights + 2 * once, case.id
    assert not found, "\n".join(found[:8])


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{a.operation}-{a.name}")
def test_what_is_refused(algorithm, emulated):
    call = next(iter(calls.plain_calls(algorithm.operation, torch.float32)))
    spec = dataclasses.replace(call.spec, dtype=torch.int32)
    table = emulated[algorithm]
    assert "float" in (table.supports(harness.native.args_of(spec, table.flags)) or "")
    if algorithm.name in ("implicit gemm", "gemm", "winograd"):
        before = dataclasses.replace(table, sm=75)
        assert "8" in (before.supports(harness.native.args_of(call.spec, table.flags)) or "")


def test_winograd_says_what_it_cannot_do(emulated):
    table = emulated[registry.find("conv2d", "winograd@cuda")]
    by_name = {case.id: case for case in cases.CONVS}
    reasons = {"pointwise": "3x3", "stride-2": "stride", "dilation": "dilation", "groups": "group"}
    for name, word in reasons.items():
        assert word in (supported(table, calls.conv2d(by_name[name], torch.float32), abi.NHWC) or "")
    half = in_dtype(calls.conv2d(by_name["divides"], torch.float32), torch.float16)
    assert "float32" in (supported(table, half, abi.NHWC) or "")


def run_args(table: emulation.Emulated, args: abi.Args) -> None:
    failures: list[str] = []
    runtime = harness.runtime(failures, 1)
    args.runtime = ctypes.pointer(runtime)
    table.run(args)
    assert not failures, failures[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_flatten_of_any_strides(dtype, emulated):
    """Transposed dimensions go in tiles, others element by element or 16 bytes at a time."""
    kind, algorithm = DTYPES[dtype], registry.find("flatten", "direct@cuda")
    table = emulated[algorithm]
    torch.manual_seed(0)
    image = torch.randn(2, 21, 9, 13).to(kind)
    matrix = torch.randn(70, 66).to(kind)
    views = [
        *(image.contiguous(memory_format=torch.channels_last), image.permute(3, 1, 0, 2), matrix.t(), matrix[:, 1:65]),
        *(matrix[::2, ::3], torch.randn(3, 1, 40, 2).to(kind).transpose(0, 2), matrix[:64, :64].t(), image[:, 5:6]),
    ]
    for view in views:
        call = calls.make("flatten", "strided", {"start_dim": 0, "end_dim": view.dim() - 1}, view.contiguous())
        assert call is not None
        args = harness.native.args_of(call.spec, 0)
        args.input.stride[: view.dim()], args.input.data = view.stride(), view.data_ptr()
        output = harness.Guarded("output", view.numel() * view.element_size())
        args.output.data = output.address
        run_args(table, args)
        output.check()
        assert torch.equal(output.view(kind), view.reshape(-1)), (view.shape, view.stride())
    ran.add((algorithm, f"strided {dtype}"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue(dtype, emulated):
    """Of rows that lie together, and of the channels of larger images."""
    kind, table = DTYPES[dtype], emulated[registry.EPILOGUE]
    number = {torch.float32: abi.FLOAT32, torch.float64: abi.FLOAT64, torch.float16: abi.FLOAT16}.get(
        kind, abi.BFLOAT16
    )
    limit = HALVES.get(kind, references.BOUNDS.get(kind, 0))
    torch.manual_seed(0)
    for activation, function in ACTIVATIONS.items():
        for rows, columns, beside in ((1, 1003, 0), (1, 3, 0), (37, 13, 0), (37, 13, 5), (2000, 160, 3)):
            for has_residual in (False, True):
                wide = torch.randn(rows, columns + beside).to(kind)
                residual = torch.randn(rows, columns + 1).to(kind)
                output = harness.Guarded("output", wide.numel() * wide.element_size())
                held = output.view(kind).reshape(wide.shape)
                held.copy_(wide)
                args = abi.Args(dtype=number, activation=activations.NUMBERS[activation], has_residual=has_residual)
                args.output = abi.tensor_of((rows, columns))
                args.output.data, args.output.stride[0] = output.address, columns + beside
                if has_residual:
                    args.residual = abi.tensor_of((rows, columns))
                    args.residual.data, args.residual.stride[0] = residual.data_ptr(), columns + 1
                run_args(table, args)
                output.check()
                before = wide[:, :columns].double() + (residual[:, :columns].double() if has_residual else 0)
                error = references.judge(held[:, :columns], function(before), limit)[1]
                assert error is None, f"{activation} {rows}x{columns} {beside} {has_residual}: {error}"
                assert torch.equal(held[:, columns:], wide[:, columns:])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversions_of_halves(dtype, emulated):
    """Of every number, and of sums that are rounded, as PyTorch does."""
    kind, table = DTYPES[dtype], emulated[registry.EPILOGUE]
    numbers = torch.arange(65536).to(torch.int32).to(torch.int16).view(kind)
    added = numbers[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    for residual in (torch.zeros(65536, dtype=kind), added):
        output = numbers.clone()
        args = abi.Args(dtype=abi.FLOAT16 if kind == torch.float16 else abi.BFLOAT16, has_residual=1)
        args.output, args.residual = abi.tensor_of((1, 65536)), abi.tensor_of((1, 65536))
        args.output.data, args.residual.data = output.data_ptr(), residual.data_ptr()
        run_args(table, args)
        expected = (numbers.float() + residual.float()).to(kind)
        assert torch.equal(output.isnan(), expected.isnan())
        assert torch.equal(output[~output.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize(("operation", "name"), [("conv2d", "implicit gemm"), ("linear", "gemm"), ("conv2d", "smm")])
def test_gpus_with_less_shared_memory(operation, name, emulated):
    algorithm, found = registry.find(operation, f"{name}@cuda"), []
    table = dataclasses.replace(emulated[algorithm], sm=86)
    for dtype in (torch.float32, torch.float16):
        made = [*calls.few_calls(operation, torch.float32, calls.EPILOGUE)]
        if operation == "linear":
            made.append(calls.linear((64, 129, 72), torch.float32))  # rows that are no whole numbers of 16 bytes
        for call in made:
            found += wrong(algorithm, table, in_dtype(call, dtype))[1]
    assert not found, "\n".join(found)


def test_every_kernel_has_run(emulated):
    """All but those of Hopper's instructions: a kernel that no case reaches is not tested."""
    expected = {(a, d) for a in ALGORITHMS for d in DTYPES}
    expected |= {(registry.find(o, f"{name}@cuda"), "large") for o, name in LARGE}
    expected |= {(a, "activations") for a in ALGORITHMS if a.operation in MATMUL}
    expected |= {(registry.find("flatten", "direct@cuda"), f"strided {dtype}") for dtype in DTYPES}
    if not expected <= ran:
        pytest.skip("needs the other tests of this file, in this process")
    launches: dict[tuple[str, str], int] = {}
    for algorithm, table in emulated.items():
        for kernel, times in table.launches().items():
            # The kernels of a linear and of a convolution are the same.
            key = ("gemm" if "gemm" in algorithm.name else algorithm.label, kernel)
            launches[key] = launches.get(key, 0) + times
    assert [key for key, times in launches.items() if times == 0 and "wgmma" not in key[1]] == []


def changed_source(operation: str, name: str, found: str, instead: str) -> tuple[registry.Algorithm, str, str]:
    return registry.find(operation, f"{name}@cuda"), found, instead


COPIED = "copy_async_cached(at + stage + i * kStep * 128, rows[i].from + offset, rows[i].inside(p, down, right));"
# What a kernel is made to do wrong, and what is then said of it.
CHANGES = {
    "smm-barrier": (("conv2d", "smm", "__syncthreads();\n    if (part >= p.parts)", "if (part >= p.parts)"), "barrier"),
    "gemm-barrier": (
        ("linear", "gemm", "wait_all_but(p.ahead - 1);\n\n\n\n    __syncthreads();", "wait_all_but(p.ahead - 1);"),
        "barrier",
    ),
    "gemm-wait": (("linear", "gemm", "wait_all_but(p.ahead - 1);", "wait_all_but(p.ahead);"), "barrier|NaN|error"),
    "gemm-read": (
        ("linear", "gemm", COPIED, COPIED.replace("rows[i].inside(p, down, right)", "true")),
        "reads 16 bytes at",
    ),
    "gemm-swizzle": (("linear", "gemm", "2 * k + lane / 8 % 2)", "2 * k + lane / 16)"), "relative error"),
    "relu-write": (
        ("relu", "direct", "if (thread + i * threads < p.vectors) out", "if (thread + i * threads <= p.vectors) out"),
        "writes 16 bytes at",
    ),
    "relu-left": (("relu", "direct", "i < p.count; i", "i < p.count - 1; i"), "not written"),
    "relu-input": (
        ("relu", "direct", "out[thread + i * threads] = x[i]", "const_cast<Vector*>(in)[thread + i * threads] = x[i]"),
        "of input",
    ),
    "pool-shuffle": (
        (
            "adaptiveavgpool2d",
            "direct",
            "total[0] = combine<Pool::kMax>(total[0], __shfl",
            "if (slice < 31) total[0] = combine<Pool::kMax>(total[0], __shfl",
        ),
        "some threads of a warp",
    ),
    "direct-aligned": (
        ("conv2d", "direct", "if (p.vector_outputs == kVectorPixels) {", "if (true) {"),
        "not aligned|bytes at",
    ),
}


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    changes = {name: changed_source(*change) for name, (change, _) in CHANGES.items()}
    return emulation.load_changed(changes, tmp_path_factory.mktemp("changed"))


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_wrong_is_seen(name, changed):
    (operation, algorithm, *_), said = CHANGES[name]
    table, found = changed[name], []
    for number, call in enumerate(calls.plain_calls(operation, torch.float32)):
        if call.terms > 1000:
            continue
        table.set_order(emulation.ORDERS[number % 3], early=number % 2 == 0)
        found += wrong(registry.find(operation, f"{algorithm}@cuda"), table, call)[1]
    assert any(re.search(said, problem) for problem in found), found[:3]
