"""What happens before a call of a graph on a GPU, on tensors that need none: when packs are told of, and made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ai3_compile import core, on_gpu


@pytest.fixture
def told(monkeypatch):
    """The weights' addresses and versions, each time that the core library is told of them."""
    found = []
    monkeypatch.setattr(core, "refresh_packs", lambda addresses, versions: found.append((addresses, versions)))
    return found


@pytest.fixture
def made(monkeypatch):
    """The names of the operations that are run once, each time."""
    found = []
    monkeypatch.setattr(on_gpu, "_run", lambda call, inputs, device: found.append((call[0], len(inputs))))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    return found


def weights() -> list[torch.Tensor]:
    return [torch.randn(3, requires_grad=True), torch.randn(4)]


CALLS = [("conv2d", [])]
# Which of a graph's inputs come before its arguments: all of its weights, or none.
HELD = pytest.mark.parametrize("held", [0, 2])


def guarded(given: list[torch.Tensor], held: int, calls=()) -> tuple[on_gpu.Guarded, list[torch.Tensor]]:
    """A graph that adds what it is called with, and the weights that it is to be called with."""
    made = on_gpu.Guarded(lambda *a: sum(t.sum() for t in a), [0, 1], constants=given[:held], calls=calls)
    return made, given[held:]


@HELD
def test_packs_are_made_once_and_told_of_again_only_after_a_change(held, told, made):
    own = weights()
    run, rest = guarded(own, held, CALLS)
    x = torch.ones(2)
    expected = sum(t.sum() for t in (*rest, x))
    for _ in range(3):
        assert run(*rest, x) == expected
    assert len(told) == 1 and made == [("conv2d", 3)]
    with torch.no_grad():
        own[1].add_(1)
    run(*rest, x)
    run(*rest, x)
    assert len(told) == 2 and len(made) == 1, "they lie where they were"
    (_, before), (addresses, after) = told
    assert addresses == [w.data_ptr() for w in own]
    assert [b - a for a, b in zip(before, after)] == [0, 1]


@HELD
def test_weights_that_lie_elsewhere_are_packed_before_the_graph_reads_them(held, told, made):
    own = weights()
    run, rest = guarded(own, held, CALLS)
    run(*rest, torch.ones(2))
    own[0].data = torch.zeros(3)  # raises no version
    run(*rest, torch.ones(2))
    assert len(told) == 2 and len(made) == 2
    assert told[1][0] == [w.data_ptr() for w in own]


def test_other_tensors_of_the_same_memory_are_looked_at(told):
    """As functional calls give them: each with a version of its own."""
    own = weights()
    run, _ = guarded(own, 0)
    run(*own)
    others = [torch.empty(0).set_(w.detach()) for w in own]
    run(*others)
    seen = len(told)
    others[0].mul_(2)
    run(*others)
    assert len(told) == seen + 1
    assert told[-1][0] == told[0][0]


@HELD
def test_an_optimizer_step_is_a_change(held, told, monkeypatch):
    own = weights()
    run, rest = guarded(own, held)
    run(*rest)
    monkeypatch.setattr(core, "_epoch", core.epoch() + 1)
    run(*rest)
    run(*rest)
    assert len(told) == 2


def test_statistics_of_a_batch_norm_change_with_its_count(told):
    """They raise no version of their own."""
    norm = nn.BatchNorm2d(3)
    run, _ = guarded([norm.running_mean, norm.running_var], 2)
    run()
    norm.num_batches_tracked.add_(1)
    run()
    assert len(told) == 2
    assert [b - a for a, b in zip(told[0][1], told[1][1])] == [1, 1]


def test_inference_tensors_have_no_version(told):
    with torch.inference_mode():
        own = weights()
    run, _ = guarded(own, 2)
    run()
    run()
    assert [versions for _, versions in told] == [[-1, -1]]
