"""When device code is compiled, and what its failure is. NVRTC and the GPU are played, the host's part is real."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from ai3_compile import core, registry
from ai3_compile.backends import abi, builder, cuda, gpu, native, nvrtc
from ai3_compile.errors import BuildError
from ai3_compile.ops import OPERATIONS
from ai3_compile.testing import harness

RELU, GEMM = (registry.find(*name) for name in (("relu", "direct@cuda"), ("linear", "gemm@cuda")))


_NUMBERS = itertools.count(90)


@pytest.fixture
def sm():
    """A compute capability of the test's own: a library keeps the code that it was given."""
    return next(_NUMBERS)


@pytest.fixture
def compiled(monkeypatch, empty_cache, sm):
    """Names of what is compiled, and the parts."""
    found = []

    def compile(name, source, sm, flags, include_dirs):
        found.append((name, *[flag for flag in flags if flag.startswith("-DAI3_PART=")]))
        return b"no real code"

    monkeypatch.setattr(nvrtc, "compile", compile)
    monkeypatch.setattr(nvrtc, "version", lambda: "NVRTC 13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "compute_capability", lambda device: sm)
    monkeypatch.setattr(core, "register_kernel", lambda *_: None)
    cuda._compile_ahead.cache_clear()
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The host's part of the two, where the tests' empty caches do not hide it."""
    return dict(zip((RELU, GEMM), builder.build_many([cuda.PLATFORM.request(a) for a in (RELU, GEMM)])))


@pytest.fixture
def platform(built, compiled, monkeypatch):
    monkeypatch.setattr(builder, "build_many", lambda requests: [built[a] for a in (RELU, GEMM)][: len(requests)])
    made = cuda.CudaPlatform()
    made.load([RELU, GEMM])
    return made


def spec(algorithm, dtype=torch.float16):
    weight = (7, 5) if algorithm is GEMM else None
    return OPERATIONS[algorithm.operation].spec("", (3, 5), weight, False, dtype, "cuda", {})


def run(platform, algorithm, sm, dtype=torch.float16):
    """What a call of the algorithm fails with, on a machine without a driver."""
    args, failures = native.args_of(spec(algorithm, dtype), abi.NCHW), []
    args.sm = sm
    runtime = harness.runtime(failures, 1)
    args.runtime = ctypes.pointer(runtime)
    platform.table(algorithm).run(args)
    return failures


def finish():
    """What is under way in the background ends."""
    cuda._background().shutdown()
    cuda._background.cache_clear()


def test_nothing_is_compiled_before_it_runs_and_each_part_once(platform, compiled, sm):
    assert compiled == []
    for _ in range(2):
        assert all("it is not compiled" not in failure for failure in run(platform, RELU, sm))
    assert compiled == [(f"relu-direct-cuda-sm_{sm}a", "-DAI3_PART=0")]
    run(platform, GEMM, sm, torch.bfloat16)
    run(platform, GEMM, sm, torch.float64)
    assert [part for _, part in compiled[1:]] == ["-DAI3_PART=2", "-DAI3_PART=5"]


def test_what_is_announced_is_compiled_in_the_background_once(platform, compiled, sm):
    for _ in range(3):
        platform.announce([GEMM], spec(GEMM))
    finish()
    assert compiled == [(f"linear-gemm-cuda-sm_{sm}a-1", "-DAI3_PART=1")]
    run(platform, GEMM, sm)
    assert len(compiled) == 1, "it is in the cache"


def test_what_the_compiler_says_is_the_error_of_the_call_and_the_next_call_tries_again(
    platform, compiled, sm, monkeypatch
):
    play = nvrtc.compile
    monkeypatch.setattr(nvrtc, "compile", lambda name, *_: fail(name))
    platform.announce([RELU], spec(RELU))
    finish()  # what fails in the background is said by the call
    (failure,) = run(platform, RELU, sm)
    assert "relu-direct-cuda" in failure and "error: expected a ';'" in failure
    monkeypatch.setattr(nvrtc, "compile", play)
    assert not any("expected" in failure for failure in run(platform, RELU, sm))
    assert len(compiled) == 1


def fail(name):
    raise BuildError(name=name, command="nvrtc relu.cu", output="relu.cu(3): error: expected a ';'")
