"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tests run side by side already: Inductor's processes for compiling, as many as cores for each of them, only wait.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Threads that spin while they wait take the time of the tests beside: the kernels' took four times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# It takes the CPU's word for what that can, where it would compile programs to try in every new cache.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


# Long ones of few tests: a worker that began one of them last would work alone at the end.
FIRST = (
    *("test_distributed.py", "test_cuda_sources.py", "test_isa.py", "test_builder.py"),
    *("test_cuda_emulated.py", "test_cuda_emulated_sm90.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, not made yet; processes that the test starts use it as well."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("AI3_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Of PyTorch's: the tensors are small, and threads that wait for work take the time of what runs beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
