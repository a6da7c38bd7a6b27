"""Every algorithm on every case, through the C ABI, against float64, with guards around its buffers.

Bounds on ||y - ref|| / ||ref|| for unit-variance data. float32 rounds each addition by at most 6e-8 of a partial sum,
and the errors of n independent roundings grow as sqrt(n): 1e-6 holds up to n of some thousands. A Winograd transform
multiplies errors by the size of its matrices' entries: 5e-6 for F(4x4,3x3) (Barabasz et al., arXiv 1803.10986). float64
has 2^29 times the precision; 1e-13 leaves room for the same growth.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ai3_compile.selection import OpSpec, TensorSpec

from .. import cases, harness

BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-13}
WINOGRAD_BOUNDS = {torch.float32: 5e-6, torch.float64: 1e-13}
DTYPES = (torch.float32, torch.float64)


def each(operation: str):
    """Parametrises a test by the algorithms of an operation, read from the registry."""
    return pytest.mark.parametrize("algorithm", harness.algorithms(operation), ids=lambda a: a.qualified)


def bound(algorithm, dtype: torch.dtype) -> float:
    return (WINOGRAD_BOUNDS if algorithm.name == "winograd" else BOUNDS)[dtype]


def fits(algorithm, case: cases.Conv) -> bool:
    """The domains of the convolution algorithms: Winograd's mathematics is for 3x3 kernels that move by one pixel."""
    return algorithm.name != "winograd" or (case.kernel, case.stride, case.dilation) == ((3, 3), (1, 1), (1, 1))


def reference(case: cases.Conv, input, weight, bias, residual, relu: bool) -> torch.Tensor:
    top, bottom, left, right = case.padding
    padded = F.pad(input.double(), (left, right, top, bottom))
    bias = None if bias is None else bias.double()
    out = F.conv2d(padded, weight.double(), bias, case.stride, 0, case.dilation, case.groups)
    out = out if residual is None else out + residual.double()
    return out.relu() if relu else out


@each("conv2d")
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("case", cases.CONVS, ids=lambda c: c.id)
def test_conv2d(algorithm, case, dtype):
    table = harness.table_of(algorithm)
    torch.manual_seed(0)
    input = torch.randn(case.batch, case.channels, *case.size, dtype=dtype)
    weight = torch.randn(case.out, case.channels // case.groups, *case.kernel, dtype=dtype)
    bias = torch.randn(case.out, dtype=dtype)
    residual = torch.randn(case.output_shape(), dtype=dtype)

    def all_paddings(args):
        args.pad_top, args.pad_bottom, args.pad_left, args.pad_right = case.padding

    for epilogue in (False, True):
        if epilogue and not table.flags & harness.abi.EPILOGUE:
            break
        given = (bias, residual) if epilogue else (None, None)
        spec = case.spec(dtype, bias=epilogue)
        if not fits(algorithm, case):
            assert algorithm.supports(spec), "outside its domain, it must say why"
            return
        assert algorithm.supports(spec) is None
        out = harness.run_kernel(table, spec, input, weight, *given, activation=int(epilogue), adjust=all_paddings)
        expected = reference(case, input, weight, *given, relu=epilogue)
        assert out.shape == expected.shape
        assert harness.relative_error(out, expected) <= bound(algorithm, dtype)


@each("conv2d")
def test_conv2d_long_reductions_keep_the_bound(algorithm):
    """512 channels under a 3x3 kernel: 4608 products in each sum, the longest in the ResNets and VGGs."""
    case = cases.Conv("long", 512, (8, 8), 64)
    torch.manual_seed(1)
    input, weight = torch.randn(1, 512, 8, 8), torch.randn(64, 512, 3, 3)
    out = harness.run_kernel(harness.table_of(algorithm), case.spec(torch.float32, bias=False), input, weight)
    expected = reference(case, input, weight, None, None, relu=False)
    assert harness.relative_error(out, expected) <= bound(algorithm, torch.float32)


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
            found.append((case, spec))
    assert found, f"no shape is computed by {points}"
    for case, spec in found[:: max(1, len(found) // 4)]:
        torch.manual_seed(2)
        input, weight = torch.randn(1, case.channels, *case.size), torch.randn(64, case.channels, 3, 3)
        out = harness.run_kernel(table, spec, input, weight)
        expected = reference(case, input, weight, None, None, relu=False)
        assert harness.relative_error(out, expected) <= (2e-6 if tile == 2 else 5e-6)


@each("linear")
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("shape", cases.LINEARS, ids=lambda s: "x".join(map(str, s)))
def test_linear(algorithm, shape, dtype):
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    input, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    bias, residual = torch.randn(outputs, dtype=dtype), torch.randn(rows, outputs, dtype=dtype)
    for epilogue in (False, True):
        given = (bias, residual) if epilogue else (None, None)
        attributes = (
            ("weight", TensorSpec((outputs, inputs), dtype)),
            ("bias", TensorSpec((outputs,), dtype) if epilogue else None),
        )
        spec = OpSpec("linear", "", (rows, inputs), (rows, outputs), dtype, "cpu", attributes)
        assert algorithm.supports(spec) is None
        out = harness.run_kernel(harness.table_of(algorithm), spec, input, weight, *given, activation=int(epilogue))
        expected = F.linear(input.double(), weight.double(), given[0] if given[0] is None else given[0].double())
        if epilogue:
            expected = (expected + residual.double()).relu()
        assert harness.relative_error(out, expected) <= BOUNDS[dtype]


def pool_spec(operation: str, case: cases.Pool, output_shape, dtype) -> OpSpec:
    attributes = {
        "kernel_size": case.kernel,
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "ceil_mode": case.ceil_mode,
        "count_include_pad": case.count_include_pad,
        "divisor_override": case.divisor_override,
    }
    shape = (case.batch, case.channels, *case.size)
    return OpSpec(operation, case.id, shape, tuple(output_shape), dtype, "cpu", tuple(attributes.items()))


@each("maxpool2d")
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("case", cases.MAX_POOLS, ids=lambda c: c.id)
def test_maxpool2d_is_exact(algorithm, case, dtype):
    torch.manual_seed(0)
    input = torch.randn(case.batch, case.channels, *case.size, dtype=dtype)
    input[-1, 0, :3, :3] = -torch.inf  # windows without one finite value
    input[0, -1, 3, 3] = torch.nan
    expected = F.max_pool2d(input, case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode)
    spec = pool_spec("maxpool2d", case, expected.shape, dtype)
    out = harness.run_kernel(harness.table_of(algorithm), spec, input)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@each("avgpool2d")
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("case", cases.AVG_POOLS, ids=lambda c: c.id)
def test_avgpool2d(algorithm, case, dtype):
    torch.manual_seed(0)
    input = torch.randn(case.batch, case.channels, *case.size, dtype=dtype)
    window = (case.kernel, case.stride, case.padding, case.ceil_mode, case.count_include_pad, case.divisor_override)
    expected = F.avg_pool2d(input.double(), *window)
    out = harness.run_kernel(harness.table_of(algorithm), pool_spec("avgpool2d", case, expected.shape, dtype), input)
    assert harness.relative_error(out, expected) <= BOUNDS[dtype]


@each("adaptiveavgpool2d")
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(("shape", "size"), cases.ADAPTIVE, ids=str)
def test_adaptiveavgpool2d(algorithm, shape, size, dtype):
    torch.manual_seed(0)
    input = torch.randn(shape, dtype=dtype)
    expected = F.adaptive_avg_pool2d(input.double(), size)
    spec = OpSpec("adaptiveavgpool2d", "", shape, tuple(expected.shape), dtype, "cpu", (("output_size", size),))
    out = harness.run_kernel(harness.table_of(algorithm), spec, input)
    assert harness.relative_error(out, expected) <= BOUNDS[dtype]


@each("relu")
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 4096, 100_003])
def test_relu_is_exact(algorithm, count, dtype):
    torch.manual_seed(0)
    input = torch.randn(count, dtype=dtype)
    input[0] = torch.nan
    spec = OpSpec("relu", "", (count,), (count,), dtype, "cpu")
    out = harness.run_kernel(harness.table_of(algorithm), spec, input)
    assert torch.equal(out.nan_to_num(-1), input.relu().nan_to_num(-1)) and out[0].isnan()


@each("flatten")
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4, 5), (1, 7, 1, 3), (2, 64, 7, 7), (2, 1, 3, 2, 2, 3, 1, 2)])
def test_flatten_is_exact(algorithm, shape, dtype):
    input = torch.randn(shape, dtype=dtype)
    attributes = (("start_dim", 0), ("end_dim", len(shape) - 1))
    spec = OpSpec("flatten", "", shape, (input.numel(),), dtype, "cpu", attributes)
    table = harness.table_of(algorithm)
    assert not table.flags & harness.abi.NHWC
    assert torch.equal(harness.run_kernel(table, spec, input), input.flatten())
