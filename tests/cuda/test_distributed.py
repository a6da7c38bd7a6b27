"""Several GPUs: DistributedDataParallel and FSDP2 under torchrun with NCCL, and one process that computes on two."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import ai3
from ai3_compile.testing.references import relative_error

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

from ..distributed_worker import CHECKS, OPTIONS, Net, Ranks  # noqa: E402


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return Ranks("cuda", tmp_path_factory)


@pytest.mark.parametrize("name", CHECKS)
def test_on_all_ranks(name, ranks):
    ranks.verify(name)


@pytest.fixture
def network(monkeypatch) -> Net:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Net().eval()


def agrees_on(index: int, model, network: nn.Module) -> None:
    """The device that is current, cuda:0, is not the one that matters."""
    torch.manual_seed(1)
    x = torch.randn(2, 3, 16, 16, device=f"cuda:{index}")
    with torch.no_grad():
        found, expected = model(x), network(x)
    assert found.device == x.device and torch.cuda.current_device() == 0
    assert relative_error(found, expected) < 2e-5


@pytest.mark.parametrize("way", ["swap", "convert", "eager", "inductor"])
def test_a_model_computes_where_it_is(way, network):
    model = copy.deepcopy(network)
    if way == "swap":
        ai3.swap_operation("conv2d", model, OPTIONS["conv2d"])
    elif way == "convert":
        model = ai3.convert(model, {"conv2d": OPTIONS["conv2d"] + "|torch"}, (2, 3, 16, 16))
    forward = (
        torch.compile(model, backend="ai3", options={**OPTIONS, "rest": way}) if way in ("eager", "inductor") else model
    )
    for index in (1, 0, 1):
        model.to(f"cuda:{index}")
        for _ in range(2):  # with new packs, then with kept ones
            agrees_on(index, forward, network.to(f"cuda:{index}"))


def test_threads_compute_on_both_at_once(network):
    models, references = ([copy.deepcopy(network).to(f"cuda:{i}") for i in (0, 1)] for _ in range(2))
    for model in models:
        ai3.swap_operation("conv2d", model, OPTIONS["conv2d"])
    failures = []

    def work(index: int) -> None:
        try:
            for _ in range(50):
                agrees_on(index, models[index], references[index])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
