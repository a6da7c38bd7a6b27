"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, not made yet; processes that the test starts use it as well."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("AI3_CACHE_DIR", str(folder))
    return folder
