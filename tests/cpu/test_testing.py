"""check_algorithm finds what is wrong with an algorithm and nothing else; compare measures what it says."""

from __future__ import annotations

import builtins
import json
import math
import re
import uuid

import pytest
import torch
import torch.nn.functional as F

from ai3_compile import errors, registry
from ai3_compile.backends import builder
from ai3_compile.testing import check_algorithm, compare
from ai3_compile.user_algorithms import register_algorithm, unregister_algorithm

pytestmark = pytest.mark.skipif(builder.no_compiler_reason() is not None, reason=str(builder.no_compiler_reason()))

CHEAP = [a for operation in ("relu", "adaptiveavgpool2d") for a in registry.for_device(operation, "cpu")]
RELU = """
#include <ai3/kernel.h>

static const char* supports(const ai3_args* a) {
  if (a->dtype != AI3_FLOAT32) return "needs float32";
  return SUPPORTS;
}
static void run(const ai3_args* a) {
  const float* x = static_cast<const float*>(a->input.data);
  float* y = static_cast<float*>(a->output.data);
  const int64_t n = a->output.size[0];
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] < 0 ? 0 : x[i];
  BREAK
}
extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) {
  static const ai3_kernel table = [] {
    ai3_kernel k{};
    k.abi_version = AI3_ABI_VERSION;
    k.operation = "relu";
    k.algorithm = "any";
    k.version = 1;
    k.supports = supports;
    k.run = run;
    return k;
  }();
  return &table;
}
"""
LAST_UNWRITTEN = "for (int64_t i = 0; i + 1 < n; ++i)"
BROKEN = {
    "writes-behind-the-end": ("y[n] = 0;", "output: written behind its end"),
    "writes-before-the-start": ("y[-1] = 0;", "output: written before its start"),
    "writes-its-input": ("static_cast<float*>(a->input.data)[0] = 1;", "input: written, and it is an input"),
    "is-off-by-a-thousandth": ("for (int64_t i = 0; i < n; ++i) y[i] += 1e-3f;", "above 0e+00; largest at"),
    "is-wrong-for-odd-sizes": ("if (n % 2) y[n - 1] += 1;", r"relu|15 float32: wrong: relative error"),
    "makes-nan": ("y[n - 1] = y[n - 1] * 0 / 0;", "NaN where there is none, in 1 of 15 elements; the first is [14]"),
    "fails": ('a->runtime->fail(a->runtime, "no such luck");', "failed: no such luck"),
}


@pytest.fixture
def register(tmp_path):
    """Registers an algorithm for one test; returns its name."""
    added = []

    def add(operation: str, source, **options) -> str:
        name = f"test {uuid.uuid4().hex[:8]}"
        if isinstance(source, str):
            path = tmp_path / f"kernel_{len(added)}.cpp"
            path.write_text(source)
            source = path
        register_algorithm(operation, name, source, **options)
        added.append((operation, name))
        return name

    yield add
    for operation, name in added:
        unregister_algorithm(operation, name)


def relu(broken: str = "", supports: str = "nullptr") -> str:
    return RELU.replace("BREAK", broken).replace("SUPPORTS", supports)


def failing(operation: str, name: str) -> errors.AlgorithmCheckError:
    with pytest.raises(errors.AlgorithmCheckError) as caught:
        check_algorithm(operation, name)
    assert not caught.value.report.passed
    assert f"{operation} '{name}" in str(caught.value) and "cases with" in str(caught.value)
    return caught.value


@pytest.mark.parametrize("algorithm", CHEAP, ids=lambda a: f"{a.operation}-{a.name}")
def test_shipped_algorithms_pass(algorithm):
    report = check_algorithm(algorithm.operation, algorithm.qualified)
    assert report.passed and {row.verdict for row in report.rows} == {"right"}
    properties = {row.property for row in report.domain}
    assert {"float32", "float64", "batch 0", "non-contiguous", "channels_last"} <= properties
    assert "right on every case it takes" in str(report)


def test_the_domain_says_what_is_refused(register):
    report = check_algorithm("relu", register("relu", relu()))
    domain = {row.property: (row.right > 0, row.refused > 0, row.wrong) for row in report.domain}
    assert domain["float32"] == (True, False, 0) and domain["float64"] == (False, True, 0)
    assert "refused, needs float32: " in str(report)


@pytest.mark.parametrize(("code", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_kernels_are_caught(register, code, words):
    error = failing("relu", register("relu", relu(code)))
    assert words.split("|")[-1] in str(error)


def test_an_element_left_unwritten_is_caught(register):
    source = relu().replace("for (int64_t i = 0; i < n; ++i)", LAST_UNWRITTEN)
    error = failing("relu", register("relu", source))
    assert "output: 1 of 15 elements not written" in str(error) and "the first is element 14" in str(error)
    unguarded = [row for row in error.report.rows if row.variant]
    assert {row.detail for row in unguarded if row.dtype == "float32"} == {
        "not run, since it is wrong about memory in the cases before"
    }


def test_wrong_for_odd_sizes_is_right_for_even_ones(register):
    error = failing("relu", register("relu", relu("if (n % 2) y[n - 1] += 1;")))
    verdicts = {row.case: row.verdict for row in error.report.rows if row.dtype == "float32" and not row.variant}
    assert verdicts["15"] == verdicts["17"] == "wrong" and verdicts["16"] == verdicts["4096"] == "right"


def test_refusing_everything_is_caught(register):
    error = failing("relu", register("relu", relu(supports='"not today"')))
    assert "It refuses every case" in str(error) and "refused, not today: " in str(error)


def test_rtol_is_another_bound_for_float32(register):
    name = register("relu", relu("for (int64_t i = 0; i < n; ++i) y[i] *= 1 + 1e-4f;"))
    failing("relu", name)
    assert check_algorithm("relu", name, rtol=1e-3).passed


def test_python_functions_are_checked(register):
    def conv(input, weight, bias, stride, padding, dilation, groups):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    def three_by_three(op):
        return None if op.kernel_size == (3, 3) and op.groups == 1 else "needs one group of 3x3 kernels"

    report = check_algorithm("conv2d", register("conv2d", conv, supports=three_by_three))
    domain = {row.property: (row.right > 0, row.refused > 0) for row in report.domain}
    assert domain["3x3 kernel"][0] and domain["dilation"][0] and domain["bias, residual, relu"][0]
    assert domain["1x1 kernel"] == domain["depthwise"] == (False, True)


def test_python_functions_that_are_wrong_are_caught(register):
    def forgets(input):
        out = torch.empty_like(input)
        out.flatten()[:-1] = input.relu().flatten()[:-1] if input.numel() > 1 else 0
        return out

    assert "NaN where there is none" in str(failing("relu", register("relu", forgets)))
    assert "input: written, and it is an input" in str(failing("relu", register("relu", lambda x: x.relu_())))
    assert "ZeroDivisionError" in str(failing("relu", register("relu", lambda x: 1 / 0)))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("call", [check_algorithm, lambda op, name: compare(op, [(4,)], [name])])
def test_unknown_names(call):
    with pytest.raises(errors.UnknownOperationError, match="conv2d"):
        call("conv", "direct")
    with pytest.raises(errors.UnknownAlgorithmError, match="Did you mean 'direct'"):
        call("relu", "dirct")


CONVOLUTIONS = [
    ((1, 8, 9, 9), (16, 8, 3, 3)),
    {"input": (2, 8, 9, 8), "weight": (4, 4, 1, 1), "groups": 2, "stride": 2},
]


@pytest.fixture(scope="module")
def convolutions():
    return compare("conv2d", CONVOLUTIONS, ["direct", "winograd@cpp"], rounds=3)


def test_compare_measures_each_algorithm_on_each_shape(convolutions):
    rows = {(row.shape, row.algorithm): row for row in convolutions.rows}
    first, second = "1x8x9x9, 16x8x3x3", "2x8x9x8, 4x4x1x1, groups 2, stride 2"
    assert list(rows) == [(s, a) for s in (first, second) for a in ("torch", "direct@cpp", "winograd@cpp")]
    refused = rows.pop((second, "winograd@cpp"))
    assert "3x3" in refused.refused and refused.milliseconds is refused.ratio is None
    for (shape, name), row in rows.items():
        products = 16 * 7 * 7 * 8 * 9 if shape == first else 2 * 4 * 5 * 4 * 4
        assert row.refused is None and row.milliseconds > 0 and row.relative_error < 5e-6
        assert math.isclose(row.gflops * row.milliseconds * 1e6, 2 * products)
        assert math.isclose(row.ratio, row.milliseconds / rows[shape, "torch"].milliseconds)
        assert (row.packed_bytes is None) == (name == "torch")
    assert rows[first, "winograd@cpp"].workspace_bytes > 0


def test_compare_as_text_and_json(convolutions):
    text = str(convolutions)
    assert (
        re.search(r"winograd@cpp +refused: needs a 3x3, 5x5, 1x3, 3x1, 1x7 or 7x1 kernel", text) and "GFLOP/s" in text
    )
    assert len({line.index("direct@cpp") for line in text.splitlines() if "direct@cpp" in line}) == 1
    kept = json.loads(convolutions.to_json())
    assert len(kept["rows"]) == 6 and kept["operation"] == "conv2d" and kept["rows"][0]["ratio"] == 1.0


def test_compare_plots(convolutions, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    convolutions.plot(tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 600 and len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_a_plot_without_matplotlib_says_what_to_install(convolutions, tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(errors.MissingPackageError, match="pip install matplotlib"):
        convolutions.plot(tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        ("linear", ((3, 16), (8, 16))),
        ("maxpool2d", {"input": (1, 3, 9, 9), "kernel_size": 3, "stride": 2, "padding": (1, 1)}),
        ("avgpool2d", {"input": (1, 3, 9, 9), "kernel_size": (2, 3), "count_include_pad": False}),
        ("adaptiveavgpool2d", {"input": (1, 3, 9, 9), "output_size": 3}),
        ("relu", (2, 3, 4)),
        ("flatten", {"input": (2, 3, 4), "start_dim": 1}),
    ],
)
def test_compare_every_operation(operation, shape):
    found = compare(operation, [shape], rounds=1, dtype=torch.float64)
    assert [row.algorithm for row in found.rows][0] == "torch" and len(found.rows) >= 2
    assert all(row.refused is None and row.relative_error < 1e-13 for row in found.rows)
    assert all((row.gflops is not None) == (operation == "linear") for row in found.rows)


def test_compare_shows_what_fails_as_refused(register):
    name = register("relu", relu('a->runtime->fail(a->runtime, "no such luck");'))
    row = compare("relu", [(8,)], [name], rounds=1).rows[-1]
    assert row.refused.startswith("failed: ") and "no such luck" in row.refused


@pytest.mark.parametrize(
    ("operation", "shape", "words"),
    [
        ("conv2d", {"input": (1, 3, 8, 8)}, "it has no 'weight'"),
        ("conv2d", ((1, 3, 8), (4, 3, 3, 3)), "input has 3 sizes, not 4"),
        ("conv2d", ((1, 3, 8, 8), (4, 5, 3, 3)), "the input has 3 channels"),
        ("conv2d", ((1, 3, 2, 2), (4, 3, 3, 3)), "do not fit each other"),
        ("conv2d", {"input": (1, 3, 8, 8), "weight": (4, 3, 3, 3), "strides": 2}, "there is no 'strides'"),
        ("conv2d", {"input": (1, 3, 8, 8), "weight": (4, 3, 3, 3), "stride": "2"}, "stride is '2'"),
        ("linear", ((3, 16), (8, 17)), "the weight's 17 features"),
        ("maxpool2d", {"input": (1, 3, 4, 4), "kernel_size": 9}, "do not fit each other"),
        ("relu", 5, "compare takes a list of shapes"),
    ],
)
def test_malformed_shapes_are_answered_with_an_example(operation, shape, words):
    with pytest.raises(errors.ShapeError) as caught:
        compare(operation, [shape], rounds=1)
    assert words in str(caught.value) and "Write it as " in str(caught.value)
