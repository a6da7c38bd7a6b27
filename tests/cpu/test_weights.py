"""A stale pack is a wrong answer: after every way to change a weight, the next result is the changed weight's."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import ai3_compile
from ai3_compile import core

OPTIONS = {"conv2d": "winograd|gemm", "linear": "gemm", "rest": "eager"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(self.last(x).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    torch._dynamo.reset()
    net = Net().eval()
    net.norm.running_var.uniform_(0.5, 2)
    net.norm.running_mean.normal_()
    return net


def other() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def optimizer_step(kind: type, **options):
    def change(net: Net) -> None:
        net.train()
        net(torch.randn(2, 3, 8, 8)).square().sum().backward()
        kind(net.parameters(), lr=0.1, **options).step()
        net.eval()

    return change


@torch.no_grad()
def _double(net: Net) -> None:
    net.conv.weight.mul_(2)
    net.head.weight.copy_(net.head.weight + 1)


def _inference_copy(net: Net) -> None:
    with torch.inference_mode():
        net.last.weight.copy_(torch.ones_like(net.last.weight))


def _data_with_invalidate(net: Net) -> None:
    net.conv.weight.data.add_(0.5)
    net.head.weight.data.numpy()[:] = 1
    ai3_compile.invalidate(net)


def _statistics_data_with_invalidate(net: Net) -> None:
    net.norm.running_mean.data.add_(1.5)
    ai3_compile.invalidate(net)


def _replace_parameter(net: Net) -> None:
    net.conv.weight = nn.Parameter(torch.randn_like(net.conv.weight))
    net.last.weight = nn.Parameter(torch.randn_like(net.last.weight))


def _replace_data(net: Net) -> None:
    net.conv.weight.data = torch.randn_like(net.conv.weight)
    net.last.weight.data = torch.randn_like(net.last.weight)


@torch.no_grad()
def _statistics(net: Net) -> None:
    net.norm.running_mean.add_(1)
    net.norm.running_var.mul_(3)


CHANGES = {
    "load_state_dict": lambda net: net.load_state_dict(other().state_dict()),
    "load_state_dict-assign": lambda net: net.load_state_dict(other().state_dict(), assign=True),
    "no_grad-in-place": _double,
    "inference_mode-copy": _inference_copy,
    "new-parameter": _replace_parameter,
    "new-data": _replace_data,
    "vector_to_parameters": lambda net: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(other().parameters()), net.parameters()
    ),
    "to-channels_last": lambda net: net.to(memory_format=torch.channels_last),
    "batch-norm-statistics": _statistics,
    "batch-norm-momentum-update": lambda net: (net.train(), net(torch.randn(4, 3, 8, 8)), net.eval()),
    "sgd": optimizer_step(torch.optim.SGD),
    "sgd-foreach": optimizer_step(torch.optim.SGD, foreach=True),
    "sgd-fused": optimizer_step(torch.optim.SGD, fused=True),
    "adamw": optimizer_step(torch.optim.AdamW),
    "adamw-fused": optimizer_step(torch.optim.AdamW, fused=True),
    "data-with-invalidate": _data_with_invalidate,
    "statistics-data-with-invalidate": _statistics_data_with_invalidate,
}


def agree(compiled, net: Net) -> None:
    torch.manual_seed(3)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CHANGES)
def test_after_a_change_the_result_is_of_the_changed_weights(model, name):
    compiled = torch.compile(model, backend="ai3", options=OPTIONS)
    torch.manual_seed(3)
    x = torch.randn(2, 3, 8, 8)
    agree(compiled, model)
    with torch.no_grad():
        before = model(x)
    CHANGES[name](model)
    agree(compiled, model)
    with torch.no_grad():
        moved = (model(x) - before).abs().max().item()
    assert moved > 1e-2 or name == "to-channels_last", "the change must be one that shows"
    agree(compiled, model)


def test_weights_are_packed_once(model):
    compiled = torch.compile(model, backend="ai3", options=OPTIONS)
    agree(compiled, model)
    made = core.load().ai3_core_packs_made()
    for _ in range(3):
        agree(compiled, model)
    assert core.load().ai3_core_packs_made() == made


def test_new_parameters_replace_the_packs_of_the_old(model):
    ai3_compile.invalidate()
    compiled = torch.compile(model, backend="ai3", options=OPTIONS)
    for _ in range(20):
        model.conv.weight = nn.Parameter(torch.randn_like(model.conv.weight))
        agree(compiled, model)
    assert core.load().ai3_core_packs_held() <= 3, "one for each of the three layers"


def test_packs_die_with_their_model():
    library = core.load()
    ai3_compile.invalidate()

    def use_a_model() -> None:
        net = other()
        agree(torch.compile(net, backend="ai3", options=OPTIONS), net)
        assert library.ai3_core_packs_held() > 0

    use_a_model()
    torch._dynamo.reset_code_caches()
    gc.collect()
    assert library.ai3_core_packs_held() == 0


def test_a_weight_that_dies_frees_its_pack():
    library = core.load()
    ai3_compile.invalidate()
    from .test_ops import conv

    weight = torch.randn(8, 3, 3, 3)
    with torch.no_grad():
        conv(torch.randn(1, 3, 8, 8), weight, algorithm="winograd", static_weight=True)
    assert library.ai3_core_packs_held() == 1
    del weight
    gc.collect()
    assert library.ai3_core_packs_held() == 0


def test_an_address_used_again_is_another_weight():
    """The allocator gives a new weight the address of a dead one; version counters alone would not tell them apart."""
    from .test_ops import conv

    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for _ in range(50):
            weight = torch.randn(8, 3, 3, 3)
            found = conv(x, weight, algorithm="winograd", static_weight=True)
            torch.testing.assert_close(found, torch.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)
            del weight


def test_no_pack_is_kept_in_training(model):
    ai3_compile.invalidate()
    compiled = torch.compile(model.train(), backend="ai3", options=OPTIONS)
    compiled(torch.randn(2, 3, 8, 8)).sum().backward()
    assert {"winograd@cpp", "gemm@cpp"} <= {row.algorithm for row in ai3_compile.last_report()}
    assert core.load().ai3_core_packs_held() == 0


def test_inference_tensors_are_packed_anew_each_time():
    """They have no version counter: an in-place change inside inference mode shows in the next result."""
    from .test_ops import conv

    x = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        weight = torch.randn(8, 3, 3, 3)
        conv(x, weight, algorithm="winograd", static_weight=True)
        weight.mul_(2)
        found = conv(x, weight, algorithm="winograd", static_weight=True)
        torch.testing.assert_close(found, torch.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)
