"""Activations at the end of convolutions and linears: their error over all numbers, and where the passes fuse them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ai3_compile
from ai3_compile import core, kernels, registry
from ai3_compile.ops.activations import ACTIVATIONS, NAMES, NUMBERS
from ai3_compile.testing import references

core.load()
ops = torch.ops.ai3
OTHERS = [name for name in NAMES if name not in ("identity", "relu")]
EACH = pytest.mark.parametrize("name", OTHERS)
# What is fused is decided alike for both: by Inductor, which compiles for seconds, one of them is enough.
BY_EITHER = [*(("eager", name) for name in OTHERS), ("inductor", "gelu")]
EACH_WITH_A_REST = pytest.mark.parametrize(("rest", "name"), BY_EITHER)
RESTS = pytest.mark.parametrize("rest", ["inductor", "eager"])

# Linear without an epilogue of its own: the core library adds and activates.
PLAIN_LINEAR = """
#include <ai3/kernel.h>
static const char* supports(const ai3_args* a) { return a->dtype == AI3_FLOAT32 ? nullptr : "needs float32"; }
static void run(const ai3_args* a) {
  const float *x = static_cast<const float*>(a->input.data), *w = static_cast<const float*>(a->weight.data);
  float* y = static_cast<float*>(a->output.data);
  for (int64_t m = 0; m < a->input.size[0]; ++m)
    for (int64_t n = 0; n < a->output.size[1]; ++n) {
      float sum = 0;
      for (int64_t k = 0; k < a->input.size[1]; ++k) sum += x[m * a->input.size[1] + k] * w[n * a->input.size[1] + k];
      y[m * a->output.size[1] + n] = sum;
    }
}
extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) {
  static const ai3_kernel table = [] {
    ai3_kernel k{};
    k.abi_version = AI3_ABI_VERSION;
    k.operation = "linear";
    k.version = 1;
    k.supports = supports;
    k.run = run;
    return k;
  }();
  return &table;
}
"""


def identity_of(operation: str, name: str) -> int:
    (found,) = [a for a in registry.algorithms() if (a.operation, a.name, a.platform) == (operation, name, "cpp")]
    return found.id


def numbers() -> torch.Tensor:
    """Some million numbers: all magnitudes in both signs, denormals, infinities and NaN."""
    bits = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3.4e38, -3.4e38, 88.8, -88.8])
    return torch.cat([bits.view(torch.float32), torch.linspace(-30, 30, 100_003), special])


def activated(x: torch.Tensor, name: str, by: str, algorithm: int | None = None) -> torch.Tensor:
    """activation(1 * x), by an operation that multiplies each number once."""
    if by == "depthwise":  # 37 channels: whole vectors, and scalars at the end
        x = F.pad(x, (0, -x.numel() % 37))
        images, weight = x.view(1, -1, 37).permute(0, 2, 1).unsqueeze(-1), torch.ones(37, 1, 1, 1, dtype=x.dtype)
        window = (1, 1, 0, 0, 0, 0, 1, 1, 37, identity_of("conv2d", "direct"))
        out = ops.conv2d(images, weight, None, *window, channels_last=True, activation=NUMBERS[name])
        return out.squeeze(-1).permute(0, 2, 1).reshape(-1)
    algorithm = identity_of("linear", "gemm") if algorithm is None else algorithm
    weight = torch.ones(1, 1, dtype=x.dtype)
    rows = [x[:4, None], x[4:, None]]  # up to four are dot products, and the others blocks
    return torch.cat([ops.linear(r, weight, None, algorithm, activation=NUMBERS[name]) for r in rows]).view(-1)


def assert_near(found: torch.Tensor, x: torch.Tensor, name: str) -> None:
    """Near the function in float64, for x in float32.

    2e-7 * max(1, |x|): three roundings of 6e-8, of the gate (at most 1), of the polynomials within it, and of its
    product with x.
    """
    expected = ACTIVATIONS[name](x.double())
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    finite = expected.isfinite()
    error = (found.double() - expected)[finite].abs() / x.double()[finite].abs().clamp(min=1)
    assert error.max() < 2e-7, f"{error.max():.2e} at {x[finite][error.argmax()]}"


@EACH
@pytest.mark.parametrize("by", ["depthwise", "linear"])
def test_error_over_all_numbers(name, by):
    x = numbers()
    assert_near(activated(x, name, by)[: x.numel()], x, name)


@EACH
@pytest.mark.parametrize("by", ["depthwise", "linear"])
def test_error_in_double_precision(name, by):
    """1e-15 * max(1, |x|): some roundings of 1.1e-16, with libm's functions."""
    x = numbers().double()
    found, expected = activated(x, name, by)[: x.numel()], ACTIVATIONS[name](x)
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert ((found - expected)[finite].abs() / x[finite].abs().clamp(min=1)).max() < 1e-15


def test_far_from_zero_gates_are_closed_or_open():
    """What overflows inside a formula must not show: e^200 is infinite in float32."""
    far = torch.tensor([-200.0, -1e30, 200.0, 1e30] * 10)
    for name in ("silu", "gelu", "gelu_tanh", "hardswish"):
        assert torch.equal(activated(far, name, "linear"), far.relu()), name
    assert torch.equal(activated(far, "sigmoid", "linear"), (far > 0).float())


@EACH
def test_the_core_library_activates_for_algorithms_without_an_epilogue(name, tmp_path):
    source = tmp_path / "plain.cpp"
    source.write_text(PLAIN_LINEAR)
    ai3_compile.register_algorithm("linear", "plain", str(source))
    try:
        x = numbers()[::50]
        assert_near(activated(x, name, "linear", identity_of("linear", "plain")), x, name)
        input, weight, residual = torch.randn(5, 7), torch.randn(9, 7), torch.randn(5, 9)
        found = ops.linear(input, weight, None, identity_of("linear", "plain"), False, residual, NUMBERS[name])
        expected = ACTIVATIONS[name](F.linear(input.double(), weight.double()) + residual.double())
        assert references.relative_error(found, expected) < 1e-6
    finally:
        ai3_compile.unregister_algorithm("linear", "plain")


def test_the_numbers_are_those_of_the_header():
    header = (Path(kernels.__path__[0]) / "include" / "ai3" / "kernel.h").read_text()
    (body,) = re.findall(r"typedef enum ai3_activation \{(.*?)\}", header, re.DOTALL)
    assert {name.lower(): int(number) for name, number in re.findall(r"AI3_(\w+) = (\d+)", body)} == NUMBERS


class Conv(nn.Module):
    """A convolution with 13 filters, a batch norm and an activation."""

    def __init__(self, name: str, normed: bool) -> None:
        super().__init__()
        self.name, self.conv = name, nn.Conv2d(3, 13, 3, padding=1)
        self.norm = nn.BatchNorm2d(13) if normed else nn.Identity()
        if normed:
            nn.init.uniform_(self.norm.running_var, 0.5, 2)
            nn.init.normal_(self.norm.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ACTIVATIONS[self.name](self.norm(self.conv(x)))


class Mlp(nn.Module):
    """Two linears with an activation between and an addition behind, as in a transformer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.up, self.down = name, nn.Linear(12, 29), nn.Linear(29, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(ACTIVATIONS[self.name](self.up(x)))


MODELS = {
    "conv": (lambda name: Conv(name, False), (2, 3, 9, 7), [["{}"]]),
    "conv-norm": (lambda name: Conv(name, True), (2, 3, 9, 7), [["batch_norm", "{}"]]),
    "linear-2d": (Mlp, (6, 12), [["{}"], ["add"]]),
    "linear-3d": (Mlp, (2, 5, 12), [["{}"], ["add"]]),
}


def fused(report) -> list[list[str]]:
    return [row.fused for row in report if row.operation in ("conv2d", "linear")]


def near(found: torch.Tensor, model: nn.Module, x: torch.Tensor) -> None:
    """1e-6 for each operation's sum, of two at most, and activations that stretch errors by 1.5 at most."""
    with torch.no_grad():
        expected = model.double()(x.double())
    model.float()
    assert references.relative_error(found, expected) < 5e-6


@EACH
@RESTS
@pytest.mark.parametrize("kind", MODELS)
def test_compiled_graphs_fuse_it(kind, rest, name):
    make, shape, expected = MODELS[kind]
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = make(name).eval(), torch.randn(shape)
    compiled = torch.compile(model, backend="ai3", options={"rest": rest})
    with torch.inference_mode():
        found = compiled(x)
    assert fused(ai3_compile.last_report()) == [[what.format(name) for what in row] for row in expected]
    near(found, model, x)


@EACH
@pytest.mark.parametrize("kind", MODELS)
def test_convert_fuses_it(kind, name):
    make, shape, expected = MODELS[kind]
    torch.manual_seed(0)
    model, x = make(name).eval(), torch.randn(shape)
    converted = ai3_compile.convert(model, sample_input_shape=shape)
    found = converted(x)
    assert fused(converted.report) == [[what.format(name) for what in row] for row in expected]
    near(found, model, x)


@RESTS
def test_with_sizes_that_change(rest):
    """The addition behind a view needs a view of its other operand, whose first size is a symbol here."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Mlp("gelu").eval()
    compiled = torch.compile(model, backend="ai3", options={"rest": rest}, dynamic=True)
    for shape in ((2, 5, 12), (3, 7, 12)):
        x = torch.randn(shape)
        with torch.inference_mode():
            near(compiled(x), model, x)
    assert fused(ai3_compile.last_report()) == [["gelu"], ["add"]]


class TwoUsers(Conv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return ACTIVATIONS[self.name](y) + y


@EACH_WITH_A_REST
def test_a_value_with_two_users_stays(rest, name):
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = TwoUsers(name, True).eval(), torch.randn(2, 3, 9, 7)
    with torch.inference_mode():
        found = torch.compile(model, backend="ai3", options={"rest": rest})(x)
    assert fused(ai3_compile.last_report()) == [["batch_norm"]]
    near(found, model, x)


@EACH_WITH_A_REST
def test_training_fuses_nothing(rest, name):
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = Mlp(name), torch.randn(2, 5, 12)
    torch.compile(model, backend="ai3", options={"rest": rest})(x).square().sum().backward()
    assert fused(ai3_compile.last_report()) == [[], []]
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.double()(x.double()).square().sum().backward()
    for gradient, parameter in zip(found, model.parameters()):
        assert references.relative_error(gradient, parameter.grad) < 5e-6


def test_other_bounds_of_hardtanh_are_no_relu6():
    torch.compiler.reset()
    model, x = nn.Sequential(nn.Conv2d(3, 13, 3), nn.Hardtanh(-1, 6)).eval(), torch.randn(2, 3, 9, 7)
    with torch.inference_mode():
        found = torch.compile(model, backend="ai3")(x)
    assert fused(ai3_compile.last_report()) == [[]]
    near(found, model, x)


def test_an_addition_of_another_layout_stays_behind_a_view():
    """Elements of a transposed tensor do not lie in the order that a view of it would need."""

    class Transposed(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x)) + x.transpose(0, 1)

    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = Transposed("gelu").eval(), torch.randn(5, 5, 12)
    with torch.inference_mode():
        found = torch.compile(model, backend="ai3", options={"rest": "eager"})(x)
    assert fused(ai3_compile.last_report()) == [[], []]
    near(found, model, x)


@EACH
def test_python_algorithms_have_it_applied_behind(name):
    def plain(input, weight, bias):
        return F.linear(input, weight, bias)

    torch.compiler.reset()
    torch.manual_seed(0)
    ai3_compile.register_algorithm("linear", "python plain", plain)
    try:
        model, x = Mlp(name).eval(), torch.randn(2, 5, 12)
        with torch.inference_mode():
            found = torch.compile(model, backend="ai3", options={"linear": "python plain", "rest": "eager"})(x)
        assert fused(ai3_compile.last_report()) == [[name], ["add"]]
        near(found, model, x)
    finally:
        ai3_compile.unregister_algorithm("linear", "python plain")
