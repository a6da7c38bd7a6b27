"""DistributedDataParallel and FSDP2 on the CPU: two processes under torchrun, with gloo."""

from __future__ import annotations

import pytest
import torch.distributed

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)

from ..distributed_worker import CHECKS, Ranks  # noqa: E402


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return Ranks("cpu", tmp_path_factory)


@pytest.mark.parametrize("name", CHECKS)
def test_on_all_ranks(name, ranks):
    ranks.verify(name)
