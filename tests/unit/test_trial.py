"""The process that tries a user's algorithm for GPUs, played by ones that need none."""

from __future__ import annotations

import sys

import pytest

from ai3_compile import registry, trial
from ai3_compile.backends import cache
from ai3_compile.errors import AlgorithmError

MINE = registry.Algorithm("relu", "mine", "cuda", "", None, version="/1")


def command(program: str) -> list[str]:
    return [sys.executable, "-c", program]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_dir", lambda: tmp_path)


def test_what_has_come_through_is_not_tried_again():
    trial.ensure(MINE, command("import os, sys; assert os.environ['AI3_TRYING'] and open(sys.argv[1]).read()"))
    trial.ensure(MINE, command("raise SystemExit('tried again')"))
    other = registry.Algorithm("relu", "mine", "cuda", "", None, version="/2")
    with pytest.raises(AlgorithmError, match="tried again"):
        trial.ensure(other, command("raise SystemExit('tried again')"))


def test_what_ends_its_process_is_refused_with_its_last_words_and_tried_again():
    program = "import os, sys; print('an illegal memory access', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)"
    for _ in range(2):
        with pytest.raises(AlgorithmError, match=r"mine@cuda\]: it ended the process .* an illegal memory access"):
            trial.ensure(MINE, command(program))


def test_what_does_not_end_is_refused(monkeypatch):
    monkeypatch.setattr(trial, "_SECONDS", 0.2)
    with pytest.raises(AlgorithmError, match="had not ended after 0.2 s"):
        trial.ensure(MINE, command("import time; time.sleep(60)"))


def test_the_process_that_tries_starts_none(monkeypatch):
    monkeypatch.setenv(trial.TRYING, "1")
    trial.ensure(MINE, command("raise SystemExit('a process in a process')"))
