"""What `auto` measures on a GPU: each run behind what is to come before it, and what is not counted."""

from __future__ import annotations

import pytest
import torch

from ai3_compile import gpu_timing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_what_comes_before_runs_ahead_of_each_run():
    waiting, behind, alone = (torch.zeros(1, device="cuda") for _ in range(3))
    evict = gpu_timing.evict(torch.cuda.current_device())

    def before() -> None:
        evict()
        waiting.fill_(1)

    def call() -> None:
        behind.add_(waiting)
        alone.add_(1 - waiting)
        waiting.zero_()

    rounds = 3
    found = gpu_timing.seconds({"call": call}, rounds, before={"call": before})
    assert set(found) == {"call"} and 0 < found["call"] < 1
    # Called to warm up, and three times more to see how often it is to run; the first of these calls finds what was
    # timed to be taken off.
    assert alone == gpu_timing._WARM_UP + 3 - 1
    # Replayed once, timed once to know the best, then in each round.
    assert behind == 1 + (1 + 1 + rounds) * gpu_timing._MAX_RUNS


def test_a_call_that_fails_is_left_out_and_said(caplog):
    def fails() -> None:
        raise RuntimeError("it cannot")

    x = torch.zeros(8, device="cuda")
    found = gpu_timing.seconds({"fails": fails, "adds": lambda: x.add_(1)}, before={"fails": x.zero_, "adds": x.zero_})
    assert set(found) == {"adds"} and "fails is left out" in caplog.text and "it cannot" in caplog.text
