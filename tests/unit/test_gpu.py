"""Where headers of CUDA's are looked for, without a GPU: in NVIDIA's wheels, then in the toolkit."""

from __future__ import annotations

import pytest
from torch.utils import cpp_extension

from ai3_compile.backends import gpu


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Of two wheels and of a toolkit."""
    found = [tmp_path / name / "include" for name in ("first", "second", "toolkit")]
    for folder in found:
        folder.mkdir(parents=True)
    monkeypatch.setattr(gpu, "_wheels", lambda name: found[:2])
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "toolkit"))
    return found


def test_a_header_is_taken_of_the_first_that_has_it(folders):
    assert gpu.headers("cudnn.h") is None
    for folder in reversed(folders):
        (folder / "cudnn.h").touch()
        assert gpu.headers("cudnn.h") == folder


def test_there_may_be_no_toolkit(folders, monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    (folders[2] / "cudnn.h").touch()
    assert gpu.headers("cudnn.h") is None
