"""Training on real data: eager, swapped and compiled networks learn alike, and every gradient is PyTorch's.

Bounds: gradients 1e-5 relative in float32 (the forward's rounding, passed through the backward once). Loss curves start
equal to 1e-6 and drift apart as rounding is amplified by the steps: 2e-2 of the loss over an epoch, accuracy within a
percent.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ai3
from ai3_compile import core, registry
from ai3_compile.ops import MODULES as SWAPPABLE
from ai3_compile.testing.references import relative_error


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),  # batch norm makes the gradient of a bias nothing but rounding
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(2),
        )
        self.flatten, self.head = nn.Flatten(), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.flatten(self.features(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def swapped(algos: str = "guess") -> Net:
    model = net()
    for operation in SWAPPABLE:
        ai3.swap_operation(operation, model, algos)
    return model


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(data.target)[order]


def train(model: nn.Module, forward, digits, epochs: int = 3) -> tuple[list[float], float]:
    images, labels = digits
    train_x, train_y, test_x, test_y = images[:1408], labels[:1408], images[1408:], labels[1408:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    model.train()
    for _ in range(epochs):
        for x, y in zip(train_x.split(64), train_y.split(64)):
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    return losses, accuracy


@pytest.mark.parametrize("way", ["swapped", "swapped-smm", "compiled", "swapped-compiled"])
def test_a_network_learns_alike(way, digits):
    torch._dynamo.reset()
    model = net()
    expected, accuracy = train(model, model, digits)
    model = swapped("guess") if way == "swapped" else net()
    if way == "swapped-smm":
        ai3.swap_operation("conv2d", model, ["smm", "winograd"])
    if way == "swapped-compiled":
        ai3.swap_operation("conv2d", model, "gemm")
    forward = torch.compile(model, backend="ai3") if "compiled" in way else model
    losses, found = train(model, forward, digits)
    assert accuracy > 0.9 and abs(found - accuracy) <= 0.01 + 1e-6
    assert abs(losses[0] - expected[0]) < 1e-6
    epoch = len(expected) // 3
    assert max(abs(a - b) / b for a, b in zip(losses[:epoch], expected[:epoch])) < 2e-2


def grads(model: nn.Module, loss) -> list[torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def squared(x: torch.Tensor):
    return lambda model: model(x).square().mean()


@pytest.mark.parametrize(
    "algorithm",
    [a for operation in SWAPPABLE for a in registry.for_device(operation, "cpu")],
    ids=lambda a: f"{a.operation}-{a.qualified}",
)
def test_gradients_equal_eagers(algorithm, digits):
    x = digits[0][:8].clone().requires_grad_()
    model, reference = net(), net()
    ai3.swap_operation(algorithm.operation, model, algorithm.qualified + "|torch")
    expected = grads(reference, squared(x))
    x.grad, image = None, x.grad
    found = grads(model, squared(x))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected))
    assert relative_error(x.grad, image) < 1e-5


CALLS = {
    "conv2d": (nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 2, 5, 6)),
    "linear": (nn.Linear(5, 3), (4, 5)),
    "maxpool2d": (nn.MaxPool2d(2, padding=1), (1, 2, 5, 6)),
    "avgpool2d": (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), (1, 2, 5, 6)),
    "adaptiveavgpool2d": (nn.AdaptiveAvgPool2d((2, 3)), (1, 2, 5, 6)),
    "relu": (nn.ReLU(), (3, 4)),
    "flatten": (nn.Flatten(), (2, 3, 4)),
}


@pytest.mark.parametrize("operation", SWAPPABLE)
def test_gradcheck(operation):
    """Numerical derivatives in float64, first and second."""
    module, shape = CALLS[operation]
    module = copy.deepcopy(module).double()
    named = next(a.name for a in registry.of_operation(operation) if a.platform == "cpp")
    ai3.swap_operation(operation, module, named)
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, values)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_double_backward(digits):
    def penalty(model: nn.Module) -> torch.Tensor:
        x = digits[0][:4].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return gradient.square().sum()

    for a, b in zip(grads(swapped(), penalty), grads(net(), penalty)):
        assert relative_error(a, b) < 1e-5


def test_accumulated_gradients(digits):
    x = digits[0]
    found, expected = [], []
    for model, into in ((swapped(), found), (net(), expected)):
        model.eval()  # batch norm of parts is not that of the whole
        for part in x[:64].split(16):
            model(part).square().mean().backward()
        into.extend(p.grad for p in model.parameters())
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_segments(use_reentrant, digits):
    x = digits[0][:8].clone().requires_grad_()

    def loss(model: Net) -> torch.Tensor:
        y = checkpoint(model.features, x, use_reentrant=use_reentrant)
        return model.head(model.flatten(y)).square().mean()

    assert all(relative_error(a, b) < 1e-5 for a, b in zip(grads(swapped(), loss), grads(net(), loss)))


def test_a_frozen_backbone(digits):
    x = digits[0][:8]
    results = []
    for model in (swapped(), net()):
        model.features.requires_grad_(False).eval()
        results.append(grads(model, squared(x)))
        assert all(p.grad is None for p in model.features.parameters())
    assert len(results[0]) == 2 and all(relative_error(a, b) < 1e-5 for a, b in zip(*results))


def test_only_what_is_asked_for_is_computed(monkeypatch):
    asked = []
    real = torch.ops.aten.convolution_backward
    conv = nn.Conv2d(2, 3, 3)
    ai3.swap_operation("conv2d", conv, "direct")
    conv.weight.requires_grad_(False)

    class Recorded:
        def __call__(self, *args):
            asked.append(args[-1])
            return real(*args)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", Recorded())
    conv(torch.randn(1, 2, 5, 5)).sum().backward()
    assert asked == [[False, False, True]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_as_eager(dtype, digits):
    x = digits[0][:8]

    def loss(model: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            return model(x).float().square().mean()

    # The same low-precision kernels of PyTorch run in both: `default` leaves these dtypes to it.
    for a, b in zip(grads(swapped("default"), loss), grads(net(), loss)):
        assert relative_error(a, b) < 1e-5


def test_nothing_is_packed_while_training(digits):
    model = swapped()
    model(digits[0][:8]).sum().backward()
    library = core.load()
    held = library.ai3_core_packs_held()
    for _ in range(3):
        model(digits[0][:8]).sum().backward()
    assert library.ai3_core_packs_held() == held
