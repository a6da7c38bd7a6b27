"""Headers of the user's own, in the API of ai3's predecessor: compiled with the adapters and run through the C ABI."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ai3_compile import custom
from ai3_compile.backends import abi, builder, cmake, native
from ai3_compile.selection import OpSpec
from ai3_compile.testing import calls, cases, harness, references

pytestmark = pytest.mark.skipif(builder.no_compiler_reason() is not None, reason=str(builder.no_compiler_reason()))

HEADERS = Path(custom.__path__[0])
OPERATIONS = ("conv2d", "linear", "maxpool2d", "avgpool2d", "adaptiveavgpool2d", "relu", "flatten")
DTYPES = pytest.mark.parametrize("dtype", calls.DTYPES, ids=["float32", "float64"])

CONV_SIGNATURE = """
template <typename dtype>
Tensor conv2d_custom(Tensor input, const Tensor &kernel,
                     const std::optional<const Tensor> &bias,
                     const uint padding_h, const uint padding_w,
                     const uint stride_h, const uint stride_w,
                     const uint dilation_h, const uint dilation_w,
                     const PaddingMode padding_mode, uint groups)
"""

# Seven nested loops, in the manner of a header of the predecessor.
CONV = f"""
#pragma once
#include <ai3.hpp>
#include <algos.hpp>
#include <optional>

const bool DEFAULT_CONV2D = true;
{CONV_SIGNATURE}
{{
    ensure_same_type(input, kernel, bias);
    errs::bail_if(padding_mode != PaddingMode::Zeros, "padding mode must be zeros");
    errs::bail_if(groups != 1, "groups must be 1, not ", groups);
    const uint channels = input.input_channels();
    const uint in_h = input.height(), in_w = input.width();
    const uint ker_h = kernel.height(), ker_w = kernel.width();
    const uint out_c = kernel.output_channels();
    const uint out_h = output_hw_for_2d<dtype>(in_h, ker_h, padding_h, dilation_h, stride_h, false);
    const uint out_w = output_hw_for_2d_no_ceil(in_w, ker_w, padding_w, dilation_w, stride_w);

    Tensor output;
    uint samples = 1;
    if (input.batched(sample_dims::CONV2D)) {{
        samples = input.batch_size(sample_dims::CONV2D);
        output = Tensor({{samples, out_c, out_h, out_w}}, input.scalar_type);
    }} else {{
        output = Tensor({{out_c, out_h, out_w}}, input.scalar_type);
    }}
    const dtype *in = data_as<dtype>(input.data);
    const dtype *ker = data_as<dtype>(kernel.data);
    const dtype *add = bias.has_value() ? data_as<dtype>(bias->data) : nullptr;
    dtype *out = data_as<dtype>(output.data);
    for (uint s = 0; s < samples; s++)
        for (uint o = 0; o < out_c; o++)
            for (uint p = 0; p < out_h; p++)
                for (uint q = 0; q < out_w; q++) {{
                    dtype sum = add ? add[o] : 0;
                    for (uint c = 0; c < channels; c++)
                        for (uint r = 0; r < ker_h; r++)
                            for (uint t = 0; t < ker_w; t++) {{
                                const uint y = p * stride_h + r * dilation_h - padding_h;
                                const uint x = q * stride_w + t * dilation_w - padding_w;
                                if (y < in_h && x < in_w)
                                    sum += in[to_linear(s, c, y, x, channels, in_h, in_w)] *
                                           ker[to_linear(o, c, r, t, channels, ker_h, ker_w)];
                            }}
                    out[to_linear(s, o, p, q, out_c, out_h, out_w)] = sum;
                }}
    return output;
}}
"""

LINEAR = """
#pragma once
#include <ai3.hpp>
const bool DEFAULT_LINEAR = false;
template <typename dtype>
Tensor linear_custom(Tensor input, const Tensor &weight, const std::optional<const Tensor> &bias) {
    ensure_same_type(input, weight, bias);
    errs::bail_if(input.width() != weight.width(), "widths differ");
    const uint samples = input.batch_size(sample_dims::LINEAR), in = input.width(), out = weight.height();
    Tensor output({samples, out}, input.scalar_type);
    for (uint s = 0; s < samples; s++)
        for (uint o = 0; o < out; o++) {
            dtype sum = bias.has_value() ? data_as<dtype>(bias->data)[o] : 0;
            for (uint i = 0; i < in; i++)
                sum += data_as<dtype>(input.data)[to_linear(s, i, in)] *
                       data_as<dtype>(weight.data)[to_linear(o, i, in)];
            data_as<dtype>(output.data)[to_linear(s, o, out)] = sum;
        }
    return output;
}
"""

MAX_POOL = """
#pragma once
#include <ai3.hpp>
const bool DEFAULT_MAXPOOL2D = false;
template <typename dtype>
Tensor maxpool2d_custom(Tensor input, const uint kernel_h, const uint kernel_w, const uint padding_h,
                        const uint padding_w, const uint stride_h, const uint stride_w, const uint dilation_h,
                        const uint dilation_w, const bool ceil_mode) {
    const uint samples = input.batch_size(sample_dims::POOL2D), c = input.input_channels();
    const uint h = input.height(), w = input.width();
    const uint out_h = output_hw_for_2d<dtype>(h, kernel_h, padding_h, dilation_h, stride_h, ceil_mode);
    const uint out_w = output_hw_for_2d<dtype>(w, kernel_w, padding_w, dilation_w, stride_w, ceil_mode);
    Tensor output({samples, c, out_h, out_w}, input.scalar_type);
    for (uint i = 0; i < samples * c; i++)
        for (uint p = 0; p < out_h; p++)
            for (uint q = 0; q < out_w; q++) {
                dtype best = -std::numeric_limits<dtype>::infinity();
                for (uint r = 0; r < kernel_h; r++)
                    for (uint t = 0; t < kernel_w; t++) {
                        const uint y = p * stride_h + r * dilation_h - padding_h;
                        const uint x = q * stride_w + t * dilation_w - padding_w;
                        if (y >= h || x >= w) continue;
                        const dtype value = data_as<dtype>(input.data)[to_linear(i, y, x, h, w)];
                        if (value > best || std::isnan(value)) best = value;
                    }
                data_as<dtype>(output.data)[to_linear(i, p, q, out_h, out_w)] = best;
            }
    return output;
}
"""

AVG_POOL = """
#pragma once
#include <ai3.hpp>
const bool DEFAULT_AVGPOOL2D = false;
template <typename dtype>
Tensor avgpool2d_custom(Tensor input, const uint kernel_h, const uint kernel_w, const uint padding_h,
                        const uint padding_w, const uint stride_h, const uint stride_w, const bool ceil_mode,
                        const bool count_include_pad, const std::optional<int> divisor_override) {
    const uint samples = input.batch_size(sample_dims::POOL2D), c = input.input_channels();
    const uint h = input.height(), w = input.width();
    const uint out_h = output_hw_for_2d<dtype>(h, kernel_h, padding_h, std::nullopt, stride_h, ceil_mode);
    const uint out_w = output_hw_for_2d<dtype>(w, kernel_w, padding_w, std::nullopt, stride_w, ceil_mode);
    Tensor output({samples, c, out_h, out_w}, input.scalar_type);
    for (uint i = 0; i < samples * c; i++)
        for (uint p = 0; p < out_h; p++)
            for (uint q = 0; q < out_w; q++) {
                dtype sum = 0;
                int inside = 0, padded = 0;
                for (uint r = 0; r < kernel_h; r++)
                    for (uint t = 0; t < kernel_w; t++) {
                        const uint y = p * stride_h + r - padding_h, x = q * stride_w + t - padding_w;
                        padded += y + padding_h < h + 2 * padding_h && x + padding_w < w + 2 * padding_w;
                        if (y < h && x < w) sum += data_as<dtype>(input.data)[to_linear(i, y, x, h, w)], inside++;
                    }
                data_as<dtype>(output.data)[to_linear(i, p, q, out_h, out_w)] =
                    sum / divisor_override.value_or(count_include_pad ? padded : inside);
            }
    return output;
}
"""

ADAPTIVE = """
#pragma once
#include <ai3.hpp>
const bool DEFAULT_ADAPTIVEAVGPOOL2D = false;
template <typename dtype>
Tensor adaptiveavgpool2d_custom(Tensor input, const std::optional<uint> output_h, const std::optional<uint> output_w) {
    const uint n = input.batch_size(sample_dims::POOL2D) * input.input_channels();
    const uint h = input.height(), w = input.width(), P = output_h.value_or(h), Q = output_w.value_or(w);
    Tensor output({input.shape[0], input.shape[1], P, Q}, input.scalar_type);
    for (uint i = 0; i < n; i++)
        for (uint p = 0; p < P; p++)
            for (uint q = 0; q < Q; q++) {
                dtype sum = 0;
                uint count = 0;
                for (uint y = p * h / P; y < ((p + 1) * h + P - 1) / P; y++)
                    for (uint x = q * w / Q; x < ((q + 1) * w + Q - 1) / Q; x++, count++)
                        sum += data_as<dtype>(input.data)[to_linear(i, y, x, h, w)];
                data_as<dtype>(output.data)[to_linear(i, p, q, P, Q)] = sum / count;
            }
    return output;
}
"""

# In place, as the predecessor's own.
RELU = """
#pragma once
#include <ai3.hpp>
const bool DEFAULT_RELU = true;
template <typename dtype> Tensor relu_custom(Tensor input) {
    dtype *data = data_as<dtype>(input.data);
    for (uint i = 0; i < input.count(); i++) data[i] = data[i] < 0 ? 0 : data[i];
    return input;
}
"""

FLATTEN = """
#pragma once
#include <ai3.hpp>
const bool DEFAULT_FLATTEN = false;
template <typename dtype> Tensor flatten_custom(Tensor input, const uint start_dim, int end_dim_orig) {
    const uint end = end_dim_orig == -1 ? input.shape.size() - 1 : end_dim_orig;
    std::vector<uint> shape(input.shape.begin(), input.shape.begin() + start_dim);
    shape.push_back(1);
    for (uint d = start_dim; d <= end; d++) shape.back() *= input.shape[d];
    shape.insert(shape.end(), input.shape.begin() + end + 1, input.shape.end());
    input.shape = shape;
    return input;
}
"""

HEADER = {
    "conv2d": CONV,
    "linear": LINEAR,
    "maxpool2d": MAX_POOL,
    "avgpool2d": AVG_POOL,
    "adaptiveavgpool2d": ADAPTIVE,
    "relu": RELU,
    "flatten": FLATTEN,
}


def request(operation: str, folder: Path, cmake: Path | None = None) -> builder.Request:
    include_dirs = (folder, HEADERS / "include", builder.INCLUDE)
    flags = (*builder.KERNEL_FLAGS, *builder.cpu_flags(builder.cpu_isa()))
    adapter = HEADERS / "adapter" / f"{operation}.cpp"
    return builder.Request(f"custom-{operation}", (adapter,), flags, include_dirs=include_dirs, cmake=cmake)


def load(library: Path, operation: str) -> abi.Kernel:
    loaded = ctypes.CDLL(str(library))
    table = abi.kernel_table(loaded)
    table.library = loaded  # the table points into it
    assert table.abi_version == abi.ABI_VERSION and table.version == 1
    assert (table.operation, table.algorithm) == (operation.encode(), b"custom")
    return table


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[str, str], abi.Kernel]:
    """The table of an operation's adapter over a header with this text."""

    def compile(operation: str, text: str) -> abi.Kernel:
        (tmp_path / f"{operation}.hpp").write_text(text)
        r = request(operation, tmp_path)
        library = builder.build(r.name, r.sources, flags=r.flags, include_dirs=r.include_dirs)
        return load(library, operation)

    return compile


def supports(table: abi.Kernel, spec: OpSpec) -> str | None:
    reason = table.supports(native.args_of(spec, table.flags))
    return None if reason is None else reason.decode()


def run_directly(table: abi.Kernel, args: abi.Args, call: calls.Call) -> tuple[torch.Tensor, list[str]]:
    """The output of one call with these arguments, as it was left, and what was reported through `fail`."""
    reported: list[str] = []
    runtime = abi.Runtime(1)
    here = ctypes.addressof(runtime)
    runtime.parallel_for = abi.ParallelFor(lambda count, body, argument: body(argument, 0, count))
    runtime.fail = abi.Fail(lambda at, message: reported.append(message.decode() if at == here else "not its runtime"))
    args.runtime = ctypes.pointer(runtime)
    size = call.input.element_size()
    output = harness.Guarded("output", call.compute().numel() * size)
    args.input.data, args.output.data = call.input.data_ptr(), output.address
    if call.weight is not None:
        args.weight.data = call.weight.data_ptr()
    if call.bias is not None:
        args.bias, args.has_bias = call.bias.data_ptr(), 1
    table.run(args)
    output.check()
    return output.view(call.input.dtype), reported


@DTYPES
@pytest.mark.parametrize("operation", OPERATIONS)
def test_headers_of_the_predecessor(compiled, operation, dtype):
    table = compiled(operation, HEADER[operation])
    layouts = abi.NCHW if operation in calls.IMAGES else 0
    assert table.flags == layouts | (abi.DEFAULT if operation in ("conv2d", "relu") else 0)
    ran = 0
    for variant in (calls.PLAIN, calls.BIAS) if operation in ("conv2d", "linear") else (calls.PLAIN,):
        for call in calls.plain_calls(operation, dtype, variant):
            reason = supports(table, call.spec)
            if "asymmetric padding" in call.properties():
                assert reason == "needs the same padding on both sides"
                continue
            assert reason is None
            if operation == "conv2d" and call.spec.groups > 1:
                with pytest.raises(RuntimeError, match=f"groups must be 1, not {call.spec.groups}"):
                    harness.run_kernel(table, call.spec, call.input, call.weight, call.bias)
                continue
            # The harness checks as well that the inputs are as they were: relu and flatten work in place.
            out = harness.run_kernel(table, call.spec, call.input, call.weight, call.bias)
            if operation in references.EXACT:
                assert torch.equal(out.nan_to_num(7.0), call.compute().nan_to_num(7.0)), call.spec.name
            else:
                # These headers add up in plain loops, which have a bound of their own.
                terms = 0 if call.weight is None else call.weight[0].numel()
                limit = references.bound(operation, "custom", dtype, terms)
                assert references.relative_error(out, call.compute(torch.float64)) <= limit, call.spec.name
            ran += 1
    assert ran > 5


def test_flatten_of_any_strides(compiled):
    table = compiled("flatten", FLATTEN)
    for shape in cases.FLATTENS:
        call = calls.flatten(tuple(reversed(shape)), torch.float32)
        transposed = call.input.permute(*reversed(range(len(shape))))
        args = native.args_of(call.spec, table.flags)
        args.input = abi.tensor_of(shape)
        args.input.stride[: len(shape)] = transposed.stride()
        out, failures = run_directly(table, args, call)
        assert torch.equal(out, transposed.flatten()) and not failures


def test_what_a_header_cannot_be_handed(compiled):
    table = compiled("conv2d", CONV)
    fits = cases.Conv("fits", 4, (9, 8), 7)
    assert supports(table, fits.spec(torch.float32, bias=True)) is None
    assert supports(table, cases.Conv("empty", 4, (9, 8), 7, batch=0).spec(torch.float32, bias=True)) is None
    for dtype in (torch.float16, torch.bfloat16, torch.int32):
        assert supports(table, fits.spec(dtype, bias=True)) == "needs float32 or float64"
    args = native.args_of(fits.spec(torch.float32, bias=True), table.flags)
    for padding in ((0, 2, 1, 1), (1, 1, 1, 3)):
        args.pad_top, args.pad_bottom, args.pad_left, args.pad_right = padding
        assert table.supports(args) == b"needs the same padding on both sides"
    # 2^32 elements, 2^32 - 1 of them, and products beyond 64 bits.
    sizes = {(1, 2**16, 2**16): False, (3, 5, 2**32 // 15): True, (2**31, 2**31, 2**31): False, (0, 2**33, 1): False}
    for size, does in sizes.items():
        args = native.args_of(fits.spec(torch.float32, bias=True), table.flags)
        args.input.size[1:4] = size
        assert table.supports(args) == (None if does else b"needs tensors of less than 2^32 elements")


def test_what_an_average_pool_cannot_be_handed(compiled):
    table = compiled("avgpool2d", AVG_POOL)
    args = native.args_of(calls.pool("avgpool2d", cases.AVG_POOLS[0], torch.float32).spec, table.flags)
    assert table.supports(args) is None
    args.divisor_override = 2**31
    assert table.supports(args) == b"needs a divisor below 2^31"
    args.divisor_override, args.dilation_w = 0, 2
    assert table.supports(args) == b"needs a dilation of 1"


def test_templates_compile_and_say_that_they_are_empty():
    libraries = builder.build_many([request(operation, HEADERS) for operation in OPERATIONS])
    for operation, path in zip(OPERATIONS, libraries):
        table = load(path, operation)
        assert not table.flags & abi.DEFAULT
        call = next(calls.plain_calls(operation, torch.float32))
        _, failures = run_directly(table, native.args_of(call.spec, table.flags), call)
        assert failures == [f"{operation}.hpp holds no implementation yet: write {operation}_custom"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('errs::bail("not ", 1, " but ", input.height());', "not 1 but 8"),
        ("throw 5;", "threw something that is not a std::exception"),
        ("throw std::bad_alloc();", "std::bad_alloc"),
        ("return Tensor();", "returned a tensor Float [], and the output is Float [1, 64, 8, 8]"),
        ("return input;", "returned a tensor Float [1, 16, 8, 8], and the output is Float [1, 64, 8, 8]"),
        (
            "return Tensor({1, 8, 64, 8}, input.scalar_type);",
            "returned a tensor Float [1, 8, 64, 8], and the output is Float [1, 64, 8, 8]",
        ),
        (
            "return Tensor({1, 64, 8, 9}, input.scalar_type);",
            "returned a tensor Float [1, 64, 8, 9], and the output is Float [1, 64, 8, 8]",
        ),
        (
            "return Tensor({1, 64, 8, 8}, input.scalar_type).template to_type<double>(ScalarType::Float64);",
            "returned a tensor Double [1, 64, 8, 8], and the output is Float [1, 64, 8, 8]",
        ),
        ("return Tensor(nullptr, {1, 64, 8, 8}, false, input.scalar_type);", "returned a tensor without data"),
    ],
    ids=["bail", "int", "bad_alloc", "default", "input", "transposed", "too-large", "double", "null"],
)
def test_what_goes_wrong_is_reported(compiled, body, message):
    text = f"#include <ai3.hpp>\nconst bool DEFAULT_CONV2D = false;\n{CONV_SIGNATURE}{{ {body} }}\n"
    table, call = compiled("conv2d", text), calls.conv2d(cases.CONVS[0], torch.float32, calls.BIAS)
    inputs = [t for t in (call.input, call.weight, call.bias) if t is not None]
    before = [t.clone() for t in inputs]
    out, failures = run_directly(table, native.args_of(call.spec, table.flags), call)
    assert failures == [message]
    assert bool((out.view(torch.uint8) == harness.UNWRITTEN).all())
    assert len(inputs) == 3 and all(map(torch.equal, before, inputs))


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")
def test_the_project_around_custom_cmake(tmp_path):
    """The user's lines are read when the target is there, and change it."""
    user, text = tmp_path / "user's own", (HEADERS / "custom.cmake").read_text()
    user.mkdir()
    (user / "relu.hpp").write_text(RELU.replace("= true", "= IS_DEFAULT"))
    lines = text + "\ntarget_compile_definitions(ai3_algorithm PRIVATE IS_DEFAULT=true)\n"
    (user / "custom.cmake").write_text(lines)
    r = request("relu", user, cmake=user / "custom.cmake")
    built = (r.name, user / "custom.cmake", r.sources, r.flags, r.include_dirs, r.link_flags, tmp_path / "build")
    library = cmake.compile(*built)
    assert load(library, "relu").flags == abi.DEFAULT
