"""`auto` in several processes at once: one measures, the others read it; nobody waits for ever."""

from __future__ import annotations

import threading

import pytest
import torch
from filelock import FileLock

import ai3
from ai3_compile import tuning
from ai3_compile.ops import OPERATIONS
from ai3_compile.selection import Use


@pytest.fixture(scope="module", autouse=True)
def built():
    """What the operation needs, before the cache is an empty one."""
    ai3.swap_operation("relu", torch.nn.ReLU(), "direct", (2, 3))


@pytest.fixture
def spec(empty_cache, monkeypatch):
    """An operation that nothing is known of, in an empty store."""
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_key", lambda *_: "key")
    return OPERATIONS["relu"].spec("", (2, 3), None, False, torch.float32, "cpu", {})


@pytest.fixture
def measured(monkeypatch):
    """What this process measures."""
    found = []

    def measure(spec, candidates, use):
        found.append(spec)
        return {a.qualified: 1.0 for a in candidates}

    monkeypatch.setattr(tuning, "_measure", measure)
    return found


@pytest.fixture
def lock(empty_cache, spec):
    """As another process holds it while it measures."""
    path = empty_cache / "tuning-locks" / "key.lock"
    path.parent.mkdir(parents=True)
    with FileLock(path) as held:
        yield held


def test_what_another_process_measures_is_waited_for_and_read(spec, lock, measured):
    found = []
    thread = threading.Thread(target=lambda: found.append(tuning.times(spec, Use(in_graph=False))))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive(), "it waits"
    tuning._save("key", spec, {"direct@cpp": 0.5, "torch": 0.25})
    lock.release()
    thread.join(30)
    assert found == [{"direct@cpp": 0.5, "torch": 0.25}] and not measured


def test_after_the_time_out_it_measures_by_itself(spec, lock, measured, monkeypatch, caplog):
    monkeypatch.setenv("AI3_BUILD_TIMEOUT", "0.2")
    assert tuning.times(spec, Use(in_graph=False))["torch"] == 1.0
    assert measured == [spec] and "has held" in caplog.text


def test_a_folder_that_takes_no_writes_is_no_obstacle(spec, empty_cache, measured, caplog):
    empty_cache.write_text("a file where the folder would be")
    with caplog.at_level("INFO"):
        assert tuning.times(spec, Use(in_graph=False))["torch"] == 1.0
    assert measured == [spec] and "for this process alone" in caplog.text
