"""Eager users on a GPU: functions of their own with Triton kernels, and what ai3 has no algorithm for there yet."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ai3
from ai3_compile import errors
from ai3_compile.backends import gpu
from ai3_compile.testing.references import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 36, 5))
    return nn.Sequential(*layers).cuda().eval()


def image() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 12, 12, device="cuda")


@pytest.fixture
def triton_relu():
    triton = pytest.importorskip("triton")
    from . import triton_relu

    calls = []

    def relu(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.device.type)
        x = x.contiguous()
        out = torch.empty_like(x)
        triton_relu.kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), BLOCK=1024)
        return out

    ai3.register_algorithm("relu", "triton", relu, supports=lambda op: None if op.device == "cuda" else "needs a GPU")
    yield calls
    ai3.unregister_algorithm("relu", "triton")
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["swap", "convert", "eager", "inductor", "reduce-overhead"])
def test_a_triton_kernel_runs_through_every_entry(way, triton_relu):
    model, x = net(), image()
    with torch.no_grad():
        expected = model(x)
        if way == "swap":
            ai3.swap_operation("relu", model, "triton")
            found = model(x)
        elif way == "convert":
            converted = ai3.convert(model, {"relu": "triton"}, (2, 3, 12, 12))
            found = converted(x)
            assert [r.algorithm for r in converted.report if r.operation == "relu"] == ["triton@python"]
        elif way == "reduce-overhead":
            compiled = torch.compile(model, backend="ai3", mode="reduce-overhead", options=None)
            ai3.swap_operation("relu", model, "triton")
            for _ in range(3):
                found = compiled(x).clone()
        else:
            found = torch.compile(model, backend="ai3", options={"relu": "triton", "rest": way})(x)
    assert set(triton_relu) == {"cuda"} and relative_error(found, expected) < 1e-5


def test_gradients_go_through_a_triton_kernel(triton_relu):
    model, reference, x = net(), net(), image()
    ai3.swap_operation("relu", model, "triton")
    for m in (model, reference):
        m(x).square().sum().backward()
    assert all(relative_error(a.grad, b.grad) < 1e-4 for a, b in zip(model.parameters(), reference.parameters()))


# PyTorch's default rounds the products of convolutions to TF32, and another algorithm rounds others.
ROUNDED = 2e-3


def test_a_name_of_the_cpu_is_refused_and_default_follows_the_device():
    model, x = net(), image()
    expected = model(x)
    with pytest.raises(errors.NothingFitsError, match="runs on the CPU, and this operation on cuda"):
        ai3.swap_operation("conv2d", model, "direct@cpp", (2, 3, 12, 12))
    for operation in ("conv2d", "linear", "maxpool2d", "flatten"):
        ai3.swap_operation(operation, model, "default")
    assert relative_error(model(x), expected) < ROUNDED
    model.cpu()
    assert relative_error(model(x.cpu()), expected.cpu()) < ROUNDED


def test_a_model_moves_between_devices():
    network, x = net(), image()
    expected = network(x).detach()
    model = ai3.convert(network.cpu(), {}, (2, 3, 12, 12))
    assert any(row.algorithm.endswith("@cpp") for row in model.report)
    found = model.to("cuda")(x)
    assert relative_error(found, expected) < ROUNDED
    assert any("@cu" in row.algorithm for row in model.report)
    assert not any(row.algorithm.endswith("@cpp") for row in model.report)
    with pytest.raises(errors.InputError, match="The model is on cuda"):
        model(x.cpu())
    assert relative_error(model.to("cpu")(x.cpu()), expected.cpu()) < ROUNDED
    assert any(row.algorithm.endswith("@cpp") for row in model.report)


def test_a_model_on_the_gpu_is_saved_and_loaded(tmp_path):
    model, x = ai3.convert(net(), {}, (2, 3, 12, 12)), image()
    model.save(tmp_path / "m.ai3")
    assert torch.equal(ai3.load(tmp_path / "m.ai3")(x), model(x))


def test_autocast_is_followed():
    model, x = net(), image()
    with torch.autocast("cuda", torch.float16):
        expected = model(x)
        ai3.swap_operation("conv2d", model, "default")
        ai3.swap_operation("linear", model, "default")
        found = model(x)
    assert found.dtype == expected.dtype and relative_error(found, expected) < ROUNDED


# Channels, filters, size, kernel, stride and groups as in MobileNet v3: windows have few terms.
WINDOWS = {
    "3x3": (120, 120, 28, 3, 1, 120),
    "5x5": (120, 120, 28, 5, 1, 120),
    "5x5-stride": (72, 72, 56, 5, 2, 72),
    "1x1": (40, 240, 28, 1, 1, 1),
}


@pytest.mark.parametrize("selector", ["auto@cudnn", "auto"])
@pytest.mark.parametrize("window", WINDOWS)
def test_what_is_chosen_by_its_time_rounds_to_tf32(window, selector):
    """Cutting factors off would make results too small as a whole (test_tuning.py, test_cudnn_search.py)."""
    channels, filters, size, kernel, stride, groups = WINDOWS[window]
    conv = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, groups=groups, bias=False)
    model = nn.Sequential(conv).cuda().eval().to(memory_format=torch.channels_last)
    x = torch.randn(10, channels, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
    right = copy.deepcopy(model).double()(x.double())
    ai3.swap_operation("conv2d", model, selector)
    with gpu.precision(tf32=True), torch.no_grad():
        assert abs(gpu.too_large_by(model(x), right)) < gpu.CUT
