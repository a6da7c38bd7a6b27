"""Every algorithm for NVIDIA GPUs on every case, through the C ABI, against float64, with guards around its buffers.

Bounds as in references.py; TF32 rounds both factors to 2^-11, so that a sum of products errs by about that of its norm.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ai3_compile import registry
from ai3_compile.ops import activations
from ai3_compile.testing import calls, harness, references
from tests.gpu_cases import CONVS, LARGE, LARGE_POINTWISE, POINTWISE, POOLS, behind_a_norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PLATFORMS = ("cuda", "cudnn", "cublas")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
TF32 = 2e-3
TRANSFORMED = {"winograd nonfused": 2e-5, "fft": 5e-6, "fft tiling": 5e-6, "guess": 2e-5, "auto": 2e-5}
"""In float32: tiles of cuDNN's Winograd are up to 6x6, and its own choice may be a transform."""
# The algorithms that compute every case of their operation, in every dtype.
WHOLE = {("conv2d", "direct"), ("conv2d", "smm"), ("linear", "gemm")} | {
    (operation, "direct") for operation in ("maxpool2d", "avgpool2d", "adaptiveavgpool2d", "relu", "flatten")
}
FORWARD = ("conv2d", "linear", "maxpool2d", "avgpool2d", "adaptiveavgpool2d", "relu", "flatten")
ALGORITHMS = [a for a in registry.algorithms() if a.platform in PLATFORMS and a.operation in FORWARD]


def bound(algorithm: registry.Algorithm, dtype: torch.dtype, tf32: bool, terms: int) -> float:
    """FFMA kernels add `terms` products in one plain sum."""
    operation = algorithm.operation
    if operation in references.EXACT:
        return 0.0
    if tf32:
        return TF32
    least = references.bound(operation, algorithm.name, dtype, terms)
    return max(least, TRANSFORMED.get(algorithm.name, 0.0)) if dtype == torch.float32 else least


def layouts(table: harness.abi.Kernel, call: calls.Call) -> list[int | None]:
    if call.spec.operation not in calls.IMAGES:
        return [None]
    return [layout for layout in (harness.abi.NCHW, harness.abi.NHWC) if table.flags & layout]


def supported(table: harness.abi.Kernel, call: calls.Call, layout: int | None, **fields: object) -> str | None:
    args = harness.native.args_of(call.spec, table.flags if layout is None else layout)
    harness.gpu.set_device(args)
    reason = table.supports(args)
    return None if reason is None else str(reason.decode())


def wrong(algorithm: registry.Algorithm, call: calls.Call, tf32: bool) -> tuple[int, list[str]]:
    """On how many layouts the algorithm computed the call, and what was wrong."""
    table, found, computed = harness.table_of(algorithm), [], 0
    limit, expected = bound(algorithm, call.spec.dtype, tf32, call.terms), None
    number = activations.NUMBERS[call.activation]
    for layout in layouts(table, call):
        reason = supported(table, call, layout)
        if reason is not None:
            if not reason.strip():
                found.append(f"{call.spec.name}: refused without a reason")
            continue
        args = harness.native.args_of(call.spec, table.flags if layout is None else layout)
        args.activation, args.has_residual = number, call.residual is not None
        if call.variant in calls.EPILOGUES and table.fuses and not table.fuses(harness.gpu.set_device(args)):
            continue
        if call.variant in calls.EPILOGUES and not table.flags & harness.abi.EPILOGUE:
            continue
        if expected is None:
            expected = call.compute(torch.float64)
        output = harness.run_kernel(table, call.spec, *call.tensors, number, layout, allow_tf32=tf32)
        computed += 1
        error = references.judge(output, expected, limit)[1]
        if error is not None:
            found.append(f"{call.spec.name} {call.variant} layout {layout}: {error}")
    return computed, found


@pytest.fixture
def precision(request):
    with harness.gpu.precision(tf32=request.param == "tf32"):
        yield request.param


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{a.operation}-{a.qualified}")
@pytest.mark.parametrize(
    ("dtype", "precision"), [*((dtype, "ieee") for dtype in DTYPES), ("float32", "tf32")], indirect=["precision"]
)
def test_every_case(algorithm, dtype, precision):
    tf32 = precision == "tf32"
    if tf32 and algorithm.operation not in ("conv2d", "linear"):
        return
    kind = DTYPES[dtype]
    made = torch.float64 if kind == torch.float64 else torch.float32
    matmul = algorithm.operation in ("conv2d", "linear")
    computed, missing, found = 0, 0, []
    for variant in (calls.PLAIN, calls.BIAS, calls.EPILOGUE) if matmul else (calls.PLAIN,):
        for call in calls.plain_calls(algorithm.operation, made, variant):
            times, problems = wrong(algorithm, calls.in_dtype(call, kind, "cuda"), tf32)
            computed, missing = computed + times, missing + (times == 0)
            found += problems
    assert not found, "\n".join(found[:8])
    if (algorithm.operation, algorithm.name) in WHOLE and algorithm.platform == "cuda":
        assert computed and not missing, f"{missing} cases refused"


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{a.operation}-{a.qualified}")
@pytest.mark.parametrize("precision", ["ieee"], indirect=True)
def test_every_activation(algorithm, precision):
    if algorithm.operation not in ("conv2d", "linear"):
        return
    found = []
    for variant in calls.EPILOGUES:
        for dtype in (torch.float32, torch.float16):
            for call in calls.few_calls(algorithm.operation, torch.float32, variant):
                found += wrong(algorithm, calls.in_dtype(call, dtype, "cuda"), False)[1]
    assert not found, "\n".join(found[:8])


@pytest.mark.parametrize(
    ("algorithm", "dtype", "case"),
    [
        *(
            (registry.find(o, f"{name}@cuda"), dtype, case)
            for (o, name), given in LARGE.items()
            for dtype, case in given
        ),
        *((a, "float32", case) for a in ALGORITHMS if a.operation == "conv2d" for case in CONVS),
        *((a, "float32", case) for a in ALGORITHMS if a.operation in ("maxpool2d", "avgpool2d") for case in POOLS),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "id", None) or str(value),
)
def test_cases_that_fill_a_gpu(algorithm, dtype, case):
    operation, tf32 = algorithm.operation, dtype == "tf32"
    kind = DTYPES.get(dtype, torch.float32)
    if operation == "conv2d":
        call = calls.conv2d(case, torch.float32, calls.BIAS)
    elif operation == "linear":
        call = calls.linear(case, torch.float32, calls.BIAS)
    else:
        call = calls.pool(operation, case, torch.float32)
    call = calls.in_dtype(call, kind, "cuda")
    call = dataclasses.replace(call, spec=dataclasses.replace(call.spec, allow_tf32=tf32))
    assert wrong(algorithm, call, tf32)[1] == []


SLICED = [a for a in ALGORITHMS if a.operation == "conv2d"]


@pytest.mark.parametrize("algorithm", SLICED, ids=lambda a: a.qualified)
@pytest.mark.parametrize("precision", ["ieee"], indirect=True)
def test_slices(algorithm, precision):
    """Channels of larger images are read and written as they lie; what is beside them is NaN, and stays."""
    table, found = harness.table_of(algorithm), []
    for dtype in (torch.float32, torch.float16):
        for plain in calls.plain_calls("conv2d", torch.float32, calls.BIAS):
            call = calls.in_dtype(plain, dtype, "cuda")
            if not table.flags & harness.abi.NHWC or supported(table, call, harness.abi.NHWC) is not None:
                continue
            expected, limit = call.compute(torch.float64), bound(algorithm, dtype, False, call.terms)
            for beside, within in (((8, 0), (0, 0)), ((0, 3), (0, 0)), ((0, 0), (8, 0)), ((0, 0), (0, 5))):
                needed = harness.abi.STRIDED_OUTPUT if any(beside) else harness.abi.STRIDED_INPUT
                if not table.flags & needed:
                    continue
                output = harness.run_kernel(
                    table, call.spec, *call.tensors, 0, harness.abi.NHWC, beside=beside, within=within
                )
                error = references.judge(output, expected, limit)[1]
                if error is not None:
                    found.append(f"{call.spec.name} {beside} {within} {dtype}: {error}")
    assert not found, "\n".join(found[:8])


PROLOGUES = [a for a in SLICED if a.qualified == "implicit gemm@cuda"]


@pytest.mark.parametrize("algorithm", PROLOGUES, ids=lambda a: a.qualified)
@pytest.mark.parametrize(
    ("dtype", "precision"), [*((dtype, "ieee") for dtype in DTYPES), ("float32", "tf32")], indirect=["precision"]
)
def test_a_batch_norm_and_a_relu_ahead(algorithm, dtype, precision):
    tf32, kind, table, found = precision == "tf32", DTYPES[dtype], harness.table_of(algorithm), []
    made = torch.float64 if kind == torch.float64 else torch.float32
    for case in (*POINTWISE, *LARGE_POINTWISE):
        call = calls.in_dtype(calls.conv2d(case, made, calls.BIAS), kind, "cuda")
        # What is read is rounded to a half or to TF32 once more than without it.
        limit = 2 * bound(algorithm, kind, tf32, call.terms)
        for activation, least, within in (
            ("relu", 0.0, (0, 0)),
            ("identity", -torch.inf, (8, 3)),
            ("relu", 0.0, (8, 8)),
        ):
            scale, shift, expected = behind_a_norm(call, least)
            prologue = scale, shift, activations.NUMBERS[activation]
            output = harness.run_kernel(
                *(table, call.spec, *call.tensors, 0, harness.abi.NHWC),
                within=within,
                prologue=prologue,
                allow_tf32=tf32,
            )
            error = references.judge(output, expected, limit)[1]
            if error is not None:
                found.append(f"{case.id} {activation} {within}: {error}")
    assert not found, "\n".join(found[:8])


OWN = [
    registry.find(*name)
    for name in (("conv2d", "implicit gemm@cuda"), ("linear", "gemm@cuda"), ("linear", "direct@cuda"))
]


@pytest.mark.parametrize("algorithm", OWN, ids=lambda a: a.label)
@pytest.mark.parametrize("precision", ["tf32"], indirect=True)
def test_tf32_errs_to_either_side(algorithm, precision):
    """Of positive factors the products would all be too small if what they do not read were cut off: by 2^-12 each."""
    table, found = harness.table_of(algorithm), []
    for made in calls.few_calls(algorithm.operation, torch.float32, calls.PLAIN):
        call = calls.in_dtype(
            dataclasses.replace(made, input=made.input.abs(), weight=made.weight.abs()), torch.float32, "cuda"
        )
        if supported(table, call, None) is not None:
            continue
        expected = call.compute(torch.float64)
        inside = expected > 0
        output = harness.run_kernel(table, call.spec, *call.tensors, 0, None, allow_tf32=True).double()
        found.append(((output - expected)[inside] / expected[inside]).mean().item())
    # The mean of some hundred errors of 2^-12 at most, and the sums, which tensor cores truncate at 2^-23.
    assert found and max(abs(mean) for mean in found) < 5e-5


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.platform == "cuda"], ids=lambda a: a.label)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee")],
    indirect=["precision"],
)
def test_a_gpus_nan_stays_one(algorithm, dtype, precision):
    """Its bits are all ones but for the sign: rounding must not carry into that."""
    if algorithm.operation not in ("conv2d", "linear"):
        return
    table, kind, tf32 = harness.table_of(algorithm), DTYPES[dtype], precision == "tf32"
    bits, nan = (torch.int32, 0x7FFFFFFF) if kind == torch.float32 else (torch.int16, 0x7FFF)
    for made in calls.few_calls(algorithm.operation, torch.float32, calls.PLAIN):
        call = calls.in_dtype(made, kind, "cuda")
        if supported(table, call, None) is not None or call.input.numel() == 0:
            continue
        call.input.view(bits).view(-1)[call.input.numel() // 2] = nan
        expected = call.compute(torch.float64)
        output = harness.run_kernel(table, call.spec, *call.tensors, 0, None, allow_tf32=tf32)
        # A transform spreads it over its tile.
        assert bool(output[expected.isnan()].isnan().all()) and bool(expected.isnan().any())


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{a.operation}-{a.qualified}")
def test_other_dtypes_are_refused(algorithm):
    call = next(iter(calls.plain_calls(algorithm.operation, torch.float32)))
    spec = dataclasses.replace(call.spec, device="cuda", dtype=torch.int32)
    assert "float" in (algorithm.supports(spec) or "")
