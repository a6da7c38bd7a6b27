"""Batch norms and activations before 1x1 convolutions: the kernels, the operation, the pass, and whole models."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ai3_compile
from ai3_compile import core
from ai3_compile.errors import PrologueGradientError
from ai3_compile.ops.activations import ACTIVATIONS, NUMBERS
from ai3_compile.testing import calls, cases, harness, references

from .test_backend import RESTS, compiled
from .test_ops import conv
from .test_passes import capture, count

core.load()
APPLIERS = [a.name for a in harness.algorithms("conv2d") if harness.table_of(a).flags & harness.abi.PROLOGUE]
# scale * x + shift errs by three roundings, a sum of at most 64 products by a few more; the activations by 2e-7.
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-13}
NAMES = ("weight", "bias", "mean", "var")


def norm_of(channels: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weight, bias, mean and variance: neither zero nor one."""
    weight, bias, mean, var = torch.randn(4, channels, dtype=dtype, generator=torch.Generator().manual_seed(channels))
    return [weight + 2, bias, mean, var.abs() + 0.5]


def prologue(norm: list[torch.Tensor | None], activation: str = "relu", eps: float = 1e-3) -> dict[str, object]:
    named = {f"prologue_{name}": value for name, value in zip(NAMES, norm)}
    return {**named, "prologue_eps": eps, "prologue_activation": NUMBERS[activation]}


def reference(x, w, b, norm, activation="relu", eps=1e-3, stride=1, groups=1):
    weight, bias, mean, var = (None if t is None else t.double() for t in norm)
    y = ACTIVATIONS[activation](F.batch_norm(x.double(), mean, var, weight, bias, eps=eps))
    return F.conv2d(y, w.double(), None if b is None else b.double(), stride, groups=groups)


@pytest.mark.parametrize("algorithm", APPLIERS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(
    ("channels", "groups", "stride"), [(1, 1, 1), (7, 1, 1), (16, 1, 2), (37, 1, 3), (64, 1, 1), (34, 2, 1)]
)
def test_it_equals_batch_norm_and_activation_before_the_convolution(algorithm, dtype, batch, channels, groups, stride):
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=dtype) for s in ((batch, channels, 5, 9), (18, channels // groups, 1, 1), (18,)))
    norm = norm_of(channels, dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = x.to(memory_format=memory_format)
        named = {**prologue(norm), "channels_last": memory_format is torch.channels_last}
        found = conv(given, w, b, stride, 0, groups=groups, algorithm=algorithm, **named)
        expected = reference(x, w, b, norm, stride=stride, groups=groups)
        assert references.judge(found, expected, BOUNDS[dtype])[1] is None


@pytest.mark.parametrize("algorithm", APPLIERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_activation_and_a_norm_without_weight_or_bias(algorithm, activation):
    x, w = torch.randn(2, 19, 3, 4), torch.randn(3, 19, 1, 1)
    full = norm_of(19, torch.float32)
    for norm in (full, [None, *full[1:]], [full[0], None, *full[2:]]):
        found = conv(x, w, None, 1, 0, algorithm=algorithm, **prologue(norm, activation))
        expected = reference(x, w, None, norm, activation)
        assert references.judge(found, expected, BOUNDS[torch.float32])[1] is None


@pytest.mark.parametrize("algorithm", APPLIERS)
def test_nan_and_infinities_are_where_torch_has_them(algorithm):
    x, w, norm = torch.randn(1, 18, 4, 5), torch.ones(2, 18, 1, 1), norm_of(18, torch.float32)
    norm[0][3] = 0.0
    for place, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[0, 2, place, 0] = value
        x[0, 17, place, 1] = value
        x[0, 3, place, 2] = value
    found, expected = conv(x, w, None, 1, 0, algorithm=algorithm, **prologue(norm)), reference(x, w, None, norm)
    assert references.judge(found, expected, BOUNDS[torch.float32])[1] is None
    assert bool(expected.isnan().any() and expected.isinf().any())


@pytest.mark.parametrize("algorithm", APPLIERS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_nothing_is_written_around_and_nothing_read_beside_a_slice(algorithm, dtype):
    table = next(harness.table_of(a) for a in harness.algorithms("conv2d") if a.name == algorithm)
    found_any = False
    for case in cases.CONVS:
        call = calls.conv2d(case, dtype)
        if call.spec.kernel_size != (1, 1) or any(call.spec.padding):
            continue
        found_any = True
        weight, bias, mean, var = norm_of(call.input.shape[1], dtype)
        exact = weight.double() / var.double().sqrt()
        scale, shift = exact.to(dtype), (bias.double() - mean.double() * exact).to(dtype)
        y = (call.input.double() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).relu()
        expected = F.conv2d(y, call.weight.double(), None, call.spec.stride, groups=call.spec.groups)
        for within in ((0, 0), (2, 11)):
            given = {"within": within, "prologue": (scale, shift, NUMBERS["relu"])}
            found = harness.run_kernel(table, call.spec, call.input, call.weight, **given)
            assert references.judge(found, expected, BOUNDS[dtype])[1] is None
    assert found_any


def test_statistics_that_change_are_seen():
    """Batch norm updates them in place; the packed weight is kept."""
    x, w, norm = torch.randn(2, 8, 3, 3), nn.Parameter(torch.randn(4, 8, 1, 1)), norm_of(8, torch.float32)
    for step in range(4):
        with torch.no_grad():
            found = conv(x, w, None, 1, 0, algorithm="gemm", static_weight=True, **prologue(norm, eps=1e-3 + step % 2))
        expected = reference(x, w.detach(), None, norm, eps=1e-3 + step % 2)
        assert references.judge(found, expected, BOUNDS[x.dtype])[1] is None
        norm[step].add_(0.25)


def test_opcheck():
    x, w = torch.randn(2, 6, 4, 5), torch.randn(3, 6, 1, 1)
    window = (1, 1, 0, 0, 0, 0, 1, 1, 1, conv_id())
    torch.library.opcheck(torch.ops.ai3.conv2d.default, (x, w, None, *window), prologue(norm_of(6, x.dtype)))


def conv_id(name: str = "gemm") -> int:
    return next(a.id for a in harness.algorithms("conv2d") if a.name == name)


@pytest.mark.parametrize(
    ("kernel", "padding", "channels", "algorithm", "message"),
    [
        (3, 0, 6, "gemm", "needs a 1x1 kernel without padding"),
        (1, 1, 6, "gemm", "needs a 1x1 kernel without padding"),
        (1, 0, 5, "gemm", "batch norm needs a mean and a variance of 6 elements"),
        (1, 0, 6, "smm", r"conv2d\[smm@cpp\] cannot apply a batch norm to its input"),
    ],
)
def test_what_cannot_have_one_is_refused(kernel, padding, channels, algorithm, message):
    x, w = torch.randn(2, 6, 5, 5), torch.randn(4, 6, kernel, kernel)
    with pytest.raises(RuntimeError, match=message):
        conv(x, w, None, 1, padding, algorithm=algorithm, **prologue(norm_of(channels, x.dtype)))


def test_no_gradient_goes_through_it():
    x, w = torch.randn(2, 6, 5, 5, requires_grad=True), torch.randn(4, 6, 1, 1)
    with pytest.raises(PrologueGradientError, match="no gradient through the batch norm of its input"):
        conv(x, w, None, 1, 0, algorithm="gemm", **prologue(norm_of(6, x.dtype)))


class Pre(nn.Module):
    """Norm, activation and convolution in this order, behind a stem that keeps the norm from being folded."""

    def __init__(self, kernel: int = 1, padding: int = 0, activation: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.activation = nn.BatchNorm2d(5), activation or nn.ReLU()
        self.conv = nn.Conv2d(5, 4, kernel, padding=padding)
        with torch.no_grad():
            for value, found in zip((*self.norm.parameters(), *self.norm.buffers()), norm_of(5, torch.float32)):
                value.copy_(found)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.activation(self.norm(x)))


class NormUsedTwice(Pre):
    def forward(self, x):
        y = self.norm(x)
        return self.conv(y.relu()) + y[:, 1:]


class ReluUsedTwice(Pre):
    def forward(self, x):
        y = self.norm(x).relu()
        return self.conv(y) + y[:, 1:]


class ReluIsTheResidual(Pre):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 5, 1)

    def forward(self, x):
        y = self.norm(x).relu()
        return self.conv(y) + y


class Sum(Pre):
    """The convolution adds what another has computed, and could write where that lies, but for its prologue."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(5, 4, 1)

    def forward(self, x):
        y = F.max_pool2d(x, 3, 1, 1)
        return F.max_pool2d(self.conv(self.norm(y).relu()) + self.other(y), 2)


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 5, 6, 7, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Identity(), nn.Hardswish(), nn.SiLU()], ids=str)
def test_the_pass_takes_norm_and_activation(activation):
    seen = capture(Pre(activation=activation).eval(), image(), conv2d="gemm")
    assert count(seen["fuse"], "batch_norm") == 1
    assert not any(op in target for target in seen["prologue"] for op in ("batch_norm", "relu", "hardswish", "silu"))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: Pre(3), {}),
        (lambda: Pre(padding=1), {}),
        (NormUsedTwice, {}),
        (ReluUsedTwice, {}),
        (ReluIsTheResidual, {}),
        (Pre, {"fuse": False}),
        (Pre, {"relu": "direct"}),
        (Pre, {"conv2d": "direct"}),
        (Pre, {"conv2d": "torch"}),
    ],
)
def test_a_norm_stays_where_it_is_wanted_or_the_algorithm_has_no_prologue(make, options):
    seen = capture(make().eval(), image(), **{"conv2d": "gemm", **options})
    assert count(seen["prologue"], "batch_norm") == 1


class Layers(nn.Module):
    """Models whose norm is taken and models whose norm stays, in one graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.models = nn.ModuleList([Pre(), ReluUsedTwice(), ReluIsTheResidual(), Pre(activation=nn.Hardswish())])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [model(x) for model in self.models]


@pytest.mark.parametrize("rest", RESTS)
def test_models_equal_eager_with_any_batch(rest):
    torch._dynamo.reset()
    model, exact = Layers().eval(), Layers().eval().double()
    f = compiled(model, rest=rest, conv2d="gemm")
    with torch.no_grad():
        for batch in (3, 1, 0):
            x = image(batch)
            if batch > 1:
                torch._dynamo.mark_dynamic(x, 0)
            for found, expected in zip(f(x), exact(x.double())):
                assert references.judge(found, expected, BOUNDS[x.dtype])[1] is None


def test_a_converted_model_says_so_in_its_report():
    model, x = Pre().eval(), image()
    converted = ai3_compile.convert(model, {"conv2d": "gemm"}, tuple(x.shape), strict=True)
    with torch.no_grad():
        assert references.judge(converted(x), Pre().eval().double()(x.double()), BOUNDS[x.dtype])[1] is None
    (row,) = [row for row in converted.report if row.operation == "conv2d"]
    assert row.prologue == ["batch_norm", "relu"] and "batch_norm + relu -> gemm@cpp" in str(converted.report)


def test_a_prologue_and_a_sum_in_one_sequence():
    x = image()
    converted = ai3_compile.convert(Sum().eval(), {"conv2d": "gemm"}, tuple(x.shape), strict=True)
    with torch.no_grad():
        assert references.judge(converted(x), Sum().eval().double()(x.double()), BOUNDS[x.dtype])[1] is None
    assert any(row.prologue and "add" in row.fused for row in converted.report)


def test_none_where_gradients_are_wanted():
    torch._dynamo.reset()
    model, x = Pre().train(), image()
    compiled(model, rest="eager", conv2d="gemm")(x).sum().backward()
    assert model.norm.weight.grad is not None
    assert not any(row.prologue for row in ai3_compile.last_report())


@pytest.mark.parametrize(
    ("dtype", "made"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_scale_and_shift_of_a_gpus_prologue(dtype, made):
    """As PyTorch computes them for kernels on GPUs, with and without weight and bias."""
    norm = norm_of(7, dtype)
    for weight, bias in itertools.product((norm[0], None), (norm[1], None)):
        both = core._scale_and_shift(weight, bias, *norm[2:], 1e-3)
        assert both.dtype == made and both.shape == (2, 7)
        x = torch.randn(5, 7, dtype=torch.float64)
        given = [None if t is None else t.double() for t in (*norm[2:], weight, bias)]
        expected = F.batch_norm(x, *given, eps=1e-3)
        found = x * both[0].double() + both[1].double()
        assert references.relative_error(found, expected) < BOUNDS[made]


def test_an_algorithm_may_apply_relu_alone(monkeypatch):
    algorithm = next(a for a in harness.algorithms("conv2d") if a.name == "gemm")
    platform = ai3_compile.registry.platforms()[algorithm.platform]
    assert platform.applies_prologues(algorithm, NUMBERS["hardswish"])
    limited = types.SimpleNamespace(flags=harness.abi.PROLOGUE | harness.abi.PROLOGUE_RELU)
    monkeypatch.setattr(platform, "table", lambda algorithm: limited)
    applied = {name for name, number in NUMBERS.items() if platform.applies_prologues(algorithm, number)}
    assert applied == {"identity", "relu"}
