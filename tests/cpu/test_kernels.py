"""Every algorithm on every case, through the C ABI, against float64, with guards around its buffers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ai3_compile.ops import activations
from ai3_compile.testing import calls, cases, harness, references
from ai3_compile.testing.check import through_abi

DTYPES = pytest.mark.parametrize("dtype", calls.DTYPES, ids=["float32", "float64"])


def each(operation: str):
    """Parametrises a test by the algorithms of an operation, read from the registry."""
    return pytest.mark.parametrize("algorithm", harness.algorithms(operation), ids=lambda a: a.qualified)


def fits(algorithm, case: cases.Conv) -> bool:
    """The domains of the convolution algorithms: Winograd's mathematics is for 3x3 kernels that move by one pixel."""
    return algorithm.name != "winograd" or (case.kernel, case.stride, case.dilation) == ((3, 3), (1, 1), (1, 1))


def assert_right(algorithm, call: calls.Call, limit: float | None = None) -> None:
    """ai3's own algorithms keep to the bounds for sums of any length."""
    assert algorithm.supports(call.spec) is None
    if limit is None:
        limit = references.bound(call.spec.operation, algorithm.name, call.spec.dtype)
    expected = call.compute(torch.float64)
    for found in through_abi(harness.table_of(algorithm), call):
        assert references.judge(found, expected, limit)[1] is None


@each("conv2d")
@DTYPES
@pytest.mark.parametrize("case", cases.CONVS, ids=lambda c: c.id)
def test_conv2d(algorithm, case, dtype):
    for variant in (calls.PLAIN, calls.EPILOGUE):
        call = calls.conv2d(case, dtype, variant)
        if fits(algorithm, case):
            assert_right(algorithm, call)
        else:
            assert algorithm.supports(call.spec), "outside its domain, it must say why"


@each("conv2d")
@DTYPES
@pytest.mark.parametrize("case", cases.CONVS, ids=lambda c: c.id)
def test_conv2d_writes_into_a_slice_with_bias_and_activation(algorithm, case, dtype):
    """One channel before and none behind, and the reverse: the harness checks every byte between the pixels."""
    table = harness.table_of(algorithm)
    if not table.flags & harness.abi.STRIDED_OUTPUT:
        assert algorithm.name == "smm", "of ai3's own only the one that works on contiguous images cannot"
        return
    call = dataclasses.replace(calls.conv2d(case, dtype, calls.BIAS), activation="hardswish")
    if not fits(algorithm, case):
        return
    limit, expected = references.bound("conv2d", algorithm.name, dtype), call.compute(torch.float64)
    number = activations.NUMBERS["hardswish"]
    for beside in ((1, 0), (0, 1), (64, 64)):
        found = harness.run_kernel(table, call.spec, call.input, call.weight, call.bias, None, number, None, beside)
        assert references.judge(found, expected, limit)[1] is None


READERS = [a for a in harness.algorithms("conv2d") if harness.table_of(a).flags & harness.abi.STRIDED_INPUT]


@pytest.mark.parametrize("algorithm", READERS, ids=lambda a: a.name)
@DTYPES
@pytest.mark.parametrize("case", cases.CONVS, ids=lambda c: c.id)
def test_conv2d_reads_a_slice(algorithm, case, dtype):
    """The channels beside it are NaN: one that is read shows. The same arithmetic as when dense, so the same bits."""
    if not fits(algorithm, case):
        return
    call, table = calls.conv2d(case, dtype, calls.BIAS), harness.table_of(algorithm)
    dense = harness.run_kernel(table, call.spec, call.input, call.weight, call.bias)
    for within in ((1, 0), (0, 3)):
        found = harness.run_kernel(table, call.spec, call.input, call.weight, call.bias, within=within)
        assert torch.equal(found, dense)


@each("conv2d")
@DTYPES
@pytest.mark.parametrize("variant", calls.EPILOGUES)
def test_conv2d_ends_with_any_activation(algorithm, dtype, variant):
    found = [call for call in calls.few_calls("conv2d", dtype, variant) if algorithm.supports(call.spec) is None]
    assert {call.spec.name for call in found} >= {"below-columns", "groups-odd", "depthwise-odd"}
    for call in found:
        assert_right(algorithm, call)


@each("linear")
@DTYPES
@pytest.mark.parametrize("variant", calls.EPILOGUES)
def test_linear_ends_with_any_activation(algorithm, dtype, variant):
    for call in calls.few_calls("linear", dtype, variant):
        assert_right(algorithm, call)


@each("conv2d")
def test_conv2d_long_reductions_keep_the_bound(algorithm):
    """512 channels under a 3x3 kernel: 4608 products in each sum, the longest in the ResNets and VGGs."""
    assert_right(algorithm, calls.conv2d(cases.Conv("long", 512, (8, 8), 64), torch.float32))


@each("conv2d")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_conv2d_refuses_other_dtypes(algorithm, dtype):
    assert "float" in algorithm.supports(cases.CONVS[0].spec(dtype, bias=False))


@each("conv2d")
@pytest.mark.parametrize("case", cases.CONVS[:12], ids=lambda c: c.id)
def test_conv2d_answers_questions_about_an_empty_batch(algorithm, case):
    """supports, cost and the sizes are asked before anyone looks at the batch."""
    spec = dataclasses.replace(case, batch=0).spec(torch.float32, bias=True)
    table = harness.table_of(algorithm)
    args = harness.cpp.args_of(spec, table.flags)
    assert (algorithm.supports(spec) is None) == fits(algorithm, case)
    assert algorithm.cost(spec) is None or algorithm.cost(spec) >= 0
    for size in (table.workspace_bytes, table.packed_bytes, table.plan_bytes):
        assert not size or size(args) >= 0


@pytest.mark.parametrize("points", ["F(2x2,3x3)", "F(4x4,3x3)"])
def test_winograd_error_by_tile(points):
    """Both tiles are chosen by shape; each keeps its own bound: 2e-6 for F2, 5e-6 for F4."""
    (algorithm,) = [a for a in harness.algorithms("conv2d") if a.name == "winograd"]
    table = harness.table_of(algorithm)
    tile = int(points[2])
    shapes = [(c, s) for c in (64, 128, 256, 512) for s in (4, 6, 7, 8, 12, 14, 16, 28)]
    found = []
    for channels, side in shapes:
        case = cases.Conv("tile", channels, (side, side), 64)
        spec = case.spec(torch.float32, bias=False)
        if table.pack_variant(harness.cpp.args_of(spec, table.flags)) == tile:
            found.append(case)
    assert found, f"no shape is computed by {points}"
    for case in found[:: max(1, len(found) // 4)]:
        assert_right(algorithm, calls.conv2d(case, torch.float32), 2e-6 if tile == 2 else 5e-6)


@each("linear")
@DTYPES
@pytest.mark.parametrize("shape", cases.LINEARS, ids=lambda s: "x".join(map(str, s)))
def test_linear(algorithm, shape, dtype):
    for variant in (calls.PLAIN, calls.EPILOGUE):
        assert_right(algorithm, calls.linear(shape, dtype, variant))


@each("maxpool2d")
@DTYPES
@pytest.mark.parametrize("case", cases.MAX_POOLS, ids=lambda c: c.id)
def test_maxpool2d_is_exact(algorithm, case, dtype):
    assert_right(algorithm, calls.pool("maxpool2d", case, dtype))


@each("avgpool2d")
@DTYPES
@pytest.mark.parametrize("case", cases.AVG_POOLS, ids=lambda c: c.id)
def test_avgpool2d(algorithm, case, dtype):
    assert_right(algorithm, calls.pool("avgpool2d", case, dtype))


@each("adaptiveavgpool2d")
@DTYPES
@pytest.mark.parametrize(("shape", "size"), cases.ADAPTIVE, ids=str)
def test_adaptiveavgpool2d(algorithm, shape, size, dtype):
    assert_right(algorithm, calls.adaptive(shape, size, dtype))


@each("relu")
@DTYPES
@pytest.mark.parametrize("shape", cases.RELUS, ids=str)
def test_relu_is_exact(algorithm, shape, dtype):
    assert_right(algorithm, calls.relu(shape, dtype))


@each("flatten")
@DTYPES
@pytest.mark.parametrize("shape", cases.FLATTENS, ids=str)
def test_flatten_is_exact(algorithm, shape, dtype):
    assert not harness.table_of(algorithm).flags & harness.abi.NHWC
    assert_right(algorithm, calls.flatten(shape, dtype))
