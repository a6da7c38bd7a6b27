"""Algorithms of the user's own: registered in C++ and Python, found in a folder, built with CMake."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ai3
from ai3_compile import errors, registry, user_algorithms
from ai3_compile.backends import builder
from ai3_compile.testing import check_algorithm
from ai3_compile.testing.references import relative_error

pytestmark = pytest.mark.skipif(builder.no_compiler_reason() is not None, reason=str(builder.no_compiler_reason()))

# Direct convolution in plain loops; SCALE tells versions apart.
SOURCE = r"""// Plain loops over the output.
#include <ai3/kernel.h>

#ifndef SCALE
#define SCALE 1
#endif

static const char* supports(const ai3_args* a) {
  if (a->dtype != AI3_FLOAT32) return "needs float32";
  return a->groups == 1 ? nullptr : "needs groups 1";
}

static void run(const ai3_args* a) {
  const float* x = static_cast<const float*>(a->input.data);
  const float* w = static_cast<const float*>(a->weight.data);
  const float* b = static_cast<const float*>(a->bias);
  float* y = static_cast<float*>(a->output.data);
  const int64_t C = a->input.size[1], H = a->input.size[2], W = a->input.size[3];
  const int64_t K = a->output.size[1], P = a->output.size[2], Q = a->output.size[3];
  for (int64_t n = 0; n < a->output.size[0]; ++n)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t p = 0; p < P; ++p)
        for (int64_t q = 0; q < Q; ++q) {
          double sum = b ? b[k] : 0;
          for (int64_t c = 0; c < C; ++c)
            for (int64_t r = 0; r < a->kernel_h; ++r)
              for (int64_t s = 0; s < a->kernel_w; ++s) {
                const int64_t i = p * a->stride_h - a->pad_top + r * a->dilation_h;
                const int64_t j = q * a->stride_w - a->pad_left + s * a->dilation_w;
                if (i < 0 || i >= H || j < 0 || j >= W) continue;
                sum += x[((n * C + c) * H + i) * W + j] * w[((k * C + c) * a->kernel_h + r) * a->kernel_w + s];
              }
          y[((n * K + k) * P + p) * Q + q] = SCALE * static_cast<float>(sum);
        }
}

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) {
  static const ai3_kernel table = [] {
    ai3_kernel k{};
    k.abi_version = AI3_ABI_VERSION;
    k.operation = "conv2d";
    k.version = 1;
    k.flags = AI3_NCHW;
    k.supports = supports;
    k.run = run;
    return k;
  }();
  return &table;
}
"""


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.delenv(user_algorithms.ENVIRONMENT, raising=False)
    yield
    for algorithm in registry.users():
        registry.remove(algorithm)
    user_algorithms._from_folder.clear()
    user_algorithms._folder_state = None
    torch._dynamo.reset()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "my_conv.cpp"
    path.write_text(SOURCE)
    return path


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.ReLU())
    return nn.Sequential(*layers).eval()


def image() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 11, 12)


def algorithms_of(report) -> list[str]:
    return [row.algorithm for row in report if row.operation == "conv2d"]


def entries(model: nn.Module, algos: str):
    """The model through each of the three entries, by one selector."""
    for rest in ("eager", "inductor"):
        torch._dynamo.reset()
        yield f"compile-{rest}", torch.compile(model, backend="ai3", options={"conv2d": algos, "rest": rest})
    yield "convert", ai3.convert(model, {"conv2d": algos})
    ai3.swap_operation("conv2d", model, algos)
    yield "swap", model


def test_a_source_runs_through_every_entry(source):
    algorithm = ai3.register_algorithm("conv2d", "mine", source)
    assert algorithm.qualified == "mine@cpp" and algorithm.description == "Plain loops over the output."
    assert "mine" in ai3.SUPPORTED_ALGORITHMS["conv2d"]
    model, x = net(), image()
    with torch.no_grad():
        expected = model(x)
        for name, function in entries(model, "mine"):
            assert relative_error(function(x), expected) < 2e-6, name
            if name != "swap":
                report = function.report if name == "convert" else ai3.last_report()
                assert algorithms_of(report) == ["mine@cpp"] * 2, name


def test_a_python_function_runs_through_every_entry():
    calls = []

    def mine(input, weight, bias, stride, padding, dilation, groups):
        calls.append(tuple(input.shape))
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    ai3.register_algorithm("conv2d", "mine", mine)
    model, x = net(), image()
    with torch.no_grad():
        expected = model(x)
        for name, function in entries(model, "mine"):
            calls.clear()
            assert relative_error(function(x), expected) < 2e-6, name
            assert calls == [(2, 3, 11, 12), (2, 8, 11, 12)], name


FUNCTIONS = {
    "conv2d": F.conv2d,
    "linear": F.linear,
    "maxpool2d": F.max_pool2d,
    "avgpool2d": F.avg_pool2d,
    "adaptiveavgpool2d": F.adaptive_avg_pool2d,
    "relu": F.relu,
    "flatten": torch.flatten,
}


@pytest.mark.parametrize("operation", FUNCTIONS)
def test_python_functions_are_called_as_those_of_torch(operation):
    """PyTorch's own function, registered, is right on every case of its operation."""
    ai3.register_algorithm(operation, "aten", lambda *args: FUNCTIONS[operation](*args))
    assert check_algorithm(operation, "aten").passed


def test_gradients_are_those_of_torch(source):
    ai3.register_algorithm("conv2d", "mine", source)
    ai3.register_algorithm("conv2d", "python", lambda *args: F.conv2d(*args))
    grads = {}
    for algos in ("torch", "mine", "python"):
        model = net()
        ai3.swap_operation("conv2d", model, algos)
        model(image()).square().sum().backward()
        grads[algos] = [p.grad for p in model.parameters()]
    for algos in ("mine", "python"):
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(grads[algos], grads["torch"]))


def test_several_files_flags_headers_and_libraries(tmp_path):
    folder = tmp_path / "a folder with spaces"
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "scale.h").write_text("#pragma once\ndouble scale();\n")
    scale = '#include "scale.h"\n#include <cmath>\ndouble scale() { return FACTOR * std::cos(0.0); }\n'
    (folder / "scale.cpp").write_text(scale)
    main = folder / "main.cpp"
    main.write_text(
        SOURCE.replace("#include <ai3/kernel.h>", '#include <ai3/kernel.h>\n#include "scale.h"').replace(
            "SCALE * ", "scale() * "
        )
    )
    ai3.register_algorithm(
        "conv2d",
        "scaled",
        [main, folder / "scale.cpp"],
        flags=["-DFACTOR=3"],
        include_dirs=[folder / "include"],
        libraries=["m"],
    )
    conv, x = nn.Conv2d(3, 4, 3), image()
    expected = 3 * conv(x)
    ai3.swap_operation("conv2d", conv, "scaled")
    assert relative_error(conv(x), expected) < 2e-6


def test_a_changed_source_registered_again_is_the_new_one(source):
    conv, x = nn.Conv2d(3, 4, 3), image()
    expected = conv(x)
    compiled = torch.compile(conv, backend="ai3", options={"conv2d": "mine"})
    for scale in (1, 2):
        source.write_text(SOURCE.replace("#define SCALE 1", f"#define SCALE {scale}"))
        ai3.register_algorithm("conv2d", "mine", source)
        torch._dynamo.reset()
        with torch.no_grad():
            assert relative_error(compiled(x), scale * expected) < 2e-6
        ai3.unregister_algorithm("conv2d", "mine")
    with pytest.raises(errors.UnknownAlgorithmError, match="'mine'"):
        ai3.check_options({"conv2d": "mine"})


def test_swapped_modules_follow_what_is_registered(source):
    conv, x = nn.Conv2d(3, 4, 3), image()
    ai3.register_algorithm("conv2d", "mine", source)
    ai3.swap_operation("conv2d", conv, "mine")
    conv(x)
    ai3.unregister_algorithm("conv2d", "mine")
    with pytest.raises(errors.UnknownAlgorithmError, match="'mine'"):
        conv(x)


def test_supports_narrows_the_domain(source):
    def supports(op):
        return None if op.kernel_size == (3, 3) and op.stride == (1, 1) else "needs a 3x3 kernel and stride 1"

    ai3.register_algorithm("conv2d", "mine", source, supports=supports)
    model = net()
    ai3.swap_operation("conv2d", model, "mine|torch", (2, 3, 11, 12))
    assert algorithms_of(ai3.last_report()) == ["mine@cpp", "torch"]
    with pytest.raises(errors.NothingFitsError, match="mine@cpp: needs a 3x3 kernel and stride 1"):
        ai3.swap_operation("conv2d", model, "mine", (2, 3, 11, 12))


@pytest.mark.parametrize("supports, words", [(lambda op: 1 / 0, "ZeroDivisionError"), (lambda op: True, "True")])
def test_a_broken_supports_is_an_error_that_names_the_algorithm(source, supports, words):
    ai3.register_algorithm("conv2d", "mine", source, supports=supports)
    with pytest.raises(errors.AlgorithmError, match=rf"conv2d\[mine@cpp\].*{words}"):
        ai3.swap_operation("conv2d", net(), "mine", (2, 3, 11, 12))


def _no_tensor(*args):
    return 3


def _raises(*args):
    raise IndexError("off the end")


PYTHON = {
    "raises": (_raises, "IndexError: off the end"),
    "no-tensor": (_no_tensor, "must return a torch.Tensor, not int"),
    "shape": (lambda *args: F.conv2d(*args)[:, :1], r"shape \(2, 1, 9, 10\), not \(2, 4, 9, 10\)"),
    "dtype": (lambda *args: F.conv2d(*args).double(), "dtype torch.float64, not torch.float32"),
    "arguments": (lambda x, w: x, "TypeError"),
}


@pytest.mark.parametrize("case", PYTHON)
def test_a_broken_python_function_is_an_error_that_names_the_algorithm(case):
    function, words = PYTHON[case]
    ai3.register_algorithm("conv2d", "mine", function)
    conv = nn.Conv2d(3, 4, 3)
    ai3.swap_operation("conv2d", conv, "mine")
    with pytest.raises(errors.AlgorithmError, match=words) as caught:
        conv(image())
    assert "conv2d[mine@python]" in str(caught.value)


def test_a_python_function_may_return_its_input_and_any_strides():
    ai3.register_algorithm("relu", "mine", lambda x: x)
    ai3.register_algorithm("maxpool2d", "mine", lambda *a: F.max_pool2d(*a).to(memory_format=torch.channels_last))
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    x = image()
    for operation in ("relu", "maxpool2d"):
        ai3.swap_operation(operation, model, "mine")
    y = model[0](x)
    assert y.data_ptr() != x.data_ptr() and torch.equal(y, x)
    assert model[1](x).is_contiguous() and torch.equal(model[1](x), F.max_pool2d(x, 2))


REFUSED = {
    "operation": (lambda s: ai3.register_algorithm("conv3d", "x", s), errors.UnknownOperationError, "conv2d"),
    "shipped": (lambda s: ai3.register_algorithm("conv2d", "smm", s), errors.RegistrationError, "ai3's own"),
    "taken": (lambda s: [ai3.register_algorithm("conv2d", "x", s) for _ in "12"], errors.RegistrationError, "unregis"),
    "policy": (lambda s: ai3.register_algorithm("conv2d", "default", s), errors.RegistrationError, "a meaning"),
    "platform": (lambda s: ai3.register_algorithm("conv2d", "x@cpp", s), errors.RegistrationError, "'@'"),
    "empty": (lambda s: ai3.register_algorithm("conv2d", "", s), errors.RegistrationError, "a name"),
    "no-file": (lambda s: ai3.register_algorithm("conv2d", "x", "no.cpp"), errors.RegistrationError, "no.cpp"),
    "no-source": (lambda s: ai3.register_algorithm("conv2d", "x", s.parent), errors.RegistrationError, "no file"),
    "ending": (lambda s: ai3.register_algorithm("conv2d", "x", __file__), errors.RegistrationError, "C++ source"),
    "number": (lambda s: ai3.register_algorithm("conv2d", "x", 3), errors.RegistrationError, "not 3"),
    "flags": (lambda s: ai3.register_algorithm("conv2d", "x", s, flags="-O3"), errors.RegistrationError, "sequence"),
    "flags-python": (lambda s: ai3.register_algorithm("relu", "x", abs, flags=["-g"]), errors.RegistrationError, "C++"),
    "supports": (lambda s: ai3.register_algorithm("relu", "x", abs, supports=3), errors.RegistrationError, "function"),
    "other-operation": (lambda s: ai3.register_algorithm("linear", "x", s), errors.KernelLoadError, "'conv2d'"),
    "library": (lambda s: ai3.register_algorithm("conv2d", "x", s, libraries=["nonesuch"]), errors.BuildError, "none"),
    "unregister": (lambda s: ai3.unregister_algorithm("conv2d", "smm"), errors.RegistrationError, "stays"),
    "unregister-none": (lambda s: ai3.unregister_algorithm("conv2d", "sm"), errors.UnknownAlgorithmError, "'smm'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_registered_is_refused_and_changes_nothing(case, source):
    call, kind, words = REFUSED[case]
    with pytest.raises(kind) as caught:
        call(source)
    assert words in str(caught.value)
    assert {a.name for a in registry.users()} <= ({"x"} if case == "taken" else set())


def test_a_compile_error_is_shown_with_its_file_and_line(tmp_path):
    path = tmp_path / "broken.cpp"
    path.write_text("#include <ai3/kernel.h>\nint f() { return nonesuch; }\n")
    with pytest.raises(errors.BuildError, match=r"broken\.cpp:2.*nonesuch"):
        ai3.register_algorithm("conv2d", "mine", path)


def test_a_source_without_a_table_is_refused(tmp_path):
    path = tmp_path / "empty.cpp"
    path.write_text("int unused() { return 0; }\n")
    with pytest.raises(errors.KernelLoadError, match="ai3_get_kernel"):
        ai3.register_algorithm("conv2d", "mine", path)


def test_a_missing_compiler_is_said(source, monkeypatch):
    monkeypatch.setenv("CXX", "/nonesuch/c++")
    with pytest.raises(errors.BuildError, match="there is no C\\+\\+ compiler"):
        ai3.register_algorithm("conv2d", "mine", source)


HEADER = r"""
#pragma once
#include <ai3.hpp>
const bool DEFAULT_CONV2D = MAKE_DEFAULT;
template <typename dtype>
Tensor conv2d_custom(Tensor input, const Tensor &kernel, const std::optional<const Tensor> &bias, const uint padding_h,
                     const uint padding_w, const uint stride_h, const uint stride_w, const uint dilation_h,
                     const uint dilation_w, const PaddingMode padding_mode, uint groups) {
    ensure_same_type(input, kernel, bias);
    errs::bail_if(padding_mode != PaddingMode::Zeros, "padding mode must be zeroes");
    errs::bail_if(groups != 1, "groups must be 1");
    const uint C = input.input_channels(), H = input.height(), W = input.width(), K = kernel.output_channels();
    const uint P = output_hw_for_2d<dtype>(H, kernel.height(), padding_h, dilation_h, stride_h, false);
    const uint Q = output_hw_for_2d<dtype>(W, kernel.width(), padding_w, dilation_w, stride_w, false);
    uint N = input.batched(sample_dims::CONV2D) ? input.batch_size(sample_dims::CONV2D) : 1;
    Tensor output({N, K, P, Q}, input.scalar_type);
    const dtype *x = data_as<dtype>(input.data), *w = data_as<dtype>(kernel.data);
    dtype *y = data_as<dtype>(output.data);
    for (uint n = 0; n < N; n++)
        for (uint k = 0; k < K; k++)
            for (uint p = 0; p < P; p++)
                for (uint q = 0; q < Q; q++) {
                    dtype sum = bias.has_value() ? data_as<dtype>(bias->data)[k] : 0;
                    for (uint c = 0; c < C; c++)
                        for (uint r = 0; r < kernel.height(); r++)
                            for (uint s = 0; s < kernel.width(); s++) {
                                uint i = p * stride_h - padding_h + r * dilation_h;
                                uint j = q * stride_w - padding_w + s * dilation_w;
                                if (i < H && j < W)
                                    sum += x[to_linear(n, c, i, j, C, H, W)] *
                                           w[to_linear(k, c, r, s, C, kernel.height(), kernel.width())];
                            }
                    y[to_linear(n, k, p, q, K, P, Q)] = sum;
                }
    return output;
}
"""


def test_a_folder_is_picked_up_without_any_call(tmp_path, monkeypatch):
    folder = tmp_path / "my custom"
    (folder / "conv2d").mkdir(parents=True)
    (folder / "conv2d.hpp").write_text(HEADER.replace("MAKE_DEFAULT", "false"))
    (folder / "conv2d" / "plain_loops.cpp").write_text(SOURCE)
    monkeypatch.setenv(user_algorithms.ENVIRONMENT, str(folder))
    names = ai3.SUPPORTED_ALGORITHMS["conv2d"]
    assert {"custom", "plain loops"} < set(names)
    model, x = net(), image()
    expected = model(x)
    for algos in ("custom", "plain loops@cpp", "custom|torch"):
        report = ai3.swap_operation("conv2d", model, algos, (2, 3, 11, 12))
        assert algorithms_of(report) == [algos.split("|")[0].split("@")[0] + "@cpp"] * 2
        assert relative_error(model(x), expected) < 2e-6
    (row, *_) = ai3.swap_operation("conv2d", model, "default", (2, 3, 11, 12))
    assert row.algorithm != "custom@cpp"

    (folder / "conv2d.hpp").write_text(HEADER.replace("MAKE_DEFAULT", "true"))
    (row, *_) = ai3.swap_operation("conv2d", model, "default", (2, 3, 11, 12))
    assert row.algorithm == "custom@cpp" and relative_error(model(x), expected) < 2e-6
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    ai3.swap_operation("conv2d", grouped, "custom")
    with pytest.raises(RuntimeError, match=r"conv2d\[custom@cpp\]: groups must be 1"):
        grouped(torch.randn(1, 4, 8, 8))

    monkeypatch.delenv(user_algorithms.ENVIRONMENT)
    assert "custom" not in ai3.SUPPORTED_ALGORITHMS["conv2d"]


def test_pyproject_names_the_folder(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "conv2d.hpp").write_text(HEADER.replace("MAKE_DEFAULT", "false"))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    project = tmp_path / "pyproject.toml"
    project.write_text('[tool.ai3]\ncustom = "kernels"\n')
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert "custom" in ai3.SUPPORTED_ALGORITHMS["conv2d"]
    project.write_text('[tool.ai3]\ncustom = "nowhere"\n')
    with pytest.raises(errors.OptionValueError, match="nowhere"):
        ai3.check_options({})
    project.write_text("[tool.ai3\n")
    with pytest.raises(errors.OptionValueError, match="TOML"):
        ai3.check_options({})
    project.write_text("")
    assert "custom" not in ai3.SUPPORTED_ALGORITHMS["conv2d"]


@pytest.mark.parametrize("name", ["winograd", "guess", "a|b"])
def test_a_name_that_cannot_be_is_said_every_time(name, tmp_path, monkeypatch):
    (tmp_path / "conv2d").mkdir()
    (tmp_path / "conv2d" / f"{name}.cpp").write_text(SOURCE)
    monkeypatch.setenv(user_algorithms.ENVIRONMENT, str(tmp_path))
    for _ in range(2):
        with pytest.raises(errors.RegistrationError, match=re.escape(repr(name))):
            ai3.swap_operation("conv2d", net(), "direct")


def test_a_broken_header_is_a_build_error(tmp_path, monkeypatch):
    (tmp_path / "conv2d.hpp").write_text(HEADER.replace("MAKE_DEFAULT", "perhaps"))
    monkeypatch.setenv(user_algorithms.ENVIRONMENT, str(tmp_path))
    with pytest.raises(errors.BuildError, match=r"conv2d\.hpp:4"):
        ai3.swap_operation("conv2d", net(), "custom", (2, 3, 11, 12))


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake_projects(tmp_path, source):
    (tmp_path / "custom.cmake").write_text(
        "find_package(Threads REQUIRED)\n"
        "target_link_libraries(ai3_algorithm PRIVATE Threads::Threads)\n"
        "target_compile_definitions(ai3_algorithm PRIVATE SCALE=2)\n"
    )
    ai3.register_algorithm("conv2d", "doubled", source)
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(source, project / "conv.cpp")
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(mine CXX)\n"
        "add_library(ai3_algorithm MODULE conv.cpp)\n"
        "target_include_directories(ai3_algorithm PRIVATE ${AI3_INCLUDE_DIRS})\n"
        "target_compile_definitions(ai3_algorithm PRIVATE SCALE=3)\n"
    )
    ai3.register_algorithm("conv2d", "tripled", project / "CMakeLists.txt")
    conv, x = nn.Conv2d(3, 4, 3), image()
    expected = conv(x)
    for factor, algos in ((2, "doubled"), (3, "tripled")):
        ai3.swap_operation("conv2d", conv, algos)
        assert relative_error(conv(x), factor * expected) < 2e-6
    (tmp_path / "custom.cmake").write_text("find_package(NoSuchLibrary REQUIRED)\n")
    with pytest.raises(errors.BuildError, match="NoSuchLibrary"):
        ai3.register_algorithm("conv2d", "again", source)


def test_inductor_never_runs_another_process_algorithm(tmp_path):
    """The function of one process is not another's: a graph in Inductor's cache that names it is not used."""
    program = tmp_path / "run.py"
    program.write_text(
        "import sys, torch, ai3\n"
        "ai3.register_algorithm('relu', 'mine', lambda x: x * 0 + float(sys.argv[1]))\n"
        "f = torch.compile(torch.nn.ReLU(), backend='ai3', options={'relu': 'mine'})\n"
        "with torch.no_grad(): print(f(torch.ones(3)).tolist())\n"
        "m = torch.nn.ReLU(); ai3.swap_operation('relu', m, 'mine')\n"
        "with torch.no_grad(): print(torch.compile(m, backend='inductor')(torch.ones(3)).tolist())\n"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    for value in ("2", "3"):
        ran = subprocess.run(
            [sys.executable, str(program), value], env=environment, capture_output=True, text=True, timeout=300
        )
        assert ran.stdout.splitlines() == [str([float(value)] * 3)] * 2, ran.stderr
    gc.collect()
