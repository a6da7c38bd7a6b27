"""PyTorch's own error where the core library got no memory on a GPU."""

from __future__ import annotations

import pytest
import torch

from ai3_compile import core

FULL = RuntimeError("ai3::sequence: PyTorch has no memory for 4096 bytes on cuda:1")


def test_it_is_what_pytorch_says_when_it_is_asked_again(monkeypatch):
    own, asked = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 KiB."), []

    def empty(*args, **kwargs):
        asked.append((args, kwargs))
        raise own

    monkeypatch.setattr(torch, "empty", empty)
    assert core.torchs_own(FULL) is own
    assert asked == [((4096,), {"dtype": torch.uint8, "device": "cuda:1"})]


def test_it_is_one_where_the_memory_is_free_by_then(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    error = core.torchs_own(FULL)
    assert isinstance(error, torch.OutOfMemoryError) and "CUDA out of memory" in str(error) and str(FULL) in str(error)


@pytest.mark.parametrize("text", ["something else", "PyTorch has no memory for 4096 bytes on the CPU"])
def test_other_errors_stay_as_they_are(text):
    error = RuntimeError(text)
    assert core.torchs_own(error) is error
