"""When a graph is captured and replayed, on what memory, and which graphs are left to Inductor: without a GPU.

A graph that is played records the call of what it captured, and repeats it: into the memory of the first results.
"""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace
from weakref import WeakValueDictionary

import pytest
import torch
from torch import nn

import ai3_compile as ai3
from ai3_compile import backend, cuda_graph, on_gpu
from ai3_compile.cuda_graph import Captured


class Machine:
    """A GPU that is played."""

    def __init__(self) -> None:
        self.stream, self.is_capturing, self.recording = 0, False, None
        self.captures: list[object] = []
        self.replays = 0

    def run(self, *arguments: torch.Tensor) -> list[torch.Tensor]:
        """x * w + y, into memory of its own once it is recorded."""
        x, w, y = arguments
        result = x * w + y
        if self.recording is not None:
            results = [result]
            self.recording.body = lambda: results[0].copy_(x * w + y)
            return results
        return [result]


@pytest.fixture
def machine(monkeypatch):
    made = Machine()

    class Graph:
        def replay(self):
            made.replays += 1
            self.body()

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        made.captures.append(pool)
        made.recording = graph
        yield
        made.recording = None

    monkeypatch.setattr(cuda_graph, "_memories", WeakValueDictionary())
    for name, value in {
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: made.is_capturing,
        "current_stream": lambda: SimpleNamespace(cuda_stream=made.stream),
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": lambda: object(),
        "Stream": lambda: SimpleNamespace(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def images(count: int) -> list[torch.Tensor]:
    return [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(count)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_second_call_captures_and_later_ones_replay(machine, mode):
    run, w, y = Captured(machine.run, [1], 0), torch.randn(3, 1, 1), torch.randn(2, 3, 4, 5)[..., ::1]
    expected, found = [], []
    with mode():
        for x in images(4):
            expected.append(x * w + y)
            found.append(run(x, w, y)[0])
            assert (len(machine.captures), machine.replays) == [(0, 0), (1, 1), (1, 2), (1, 3)][len(found) - 1]
            y = y + 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected)), "no result is overwritten by a later call"


def test_what_is_static_is_read_where_it_is(machine):
    run, w, y = Captured(machine.run, [1], 0), torch.randn(3, 1, 1), torch.randn(2, 3, 4, 5)
    (x,) = images(1)
    for _ in range(2):
        run(x, w, y)
    w.mul_(2)
    kept = x.clone()
    assert torch.equal(run(x, w, y)[0], x * w + y) and torch.equal(x, kept)
    other = w * 3
    assert torch.equal(run(x, other, y)[0], x * w + y), "until it is told to forget"
    run.forget()
    for _ in range(3):
        assert torch.equal(run(x, other, y)[0], x * other + y)
    assert len(machine.captures) == 2


def test_inputs_keep_their_strides(machine):
    strides = []
    run = Captured(lambda *a: (strides.append(a[2].stride()), machine.run(*a))[1], [1], 0)
    y = torch.randn(2, 3, 4, 10)[..., ::2]
    for x in images(3):
        found = run(x, torch.ones(3, 1, 1), y)[0]
        assert torch.equal(found, x + y)
    assert strides == [y.stride()] * 2


def test_each_stream_has_a_graph_and_memory_of_its_own(machine):
    run, w, y = Captured(machine.run, [1], 0), torch.randn(3, 1, 1), torch.randn(2, 3, 4, 5)
    for machine.stream in (0, 7, 0, 7, 0, 7):
        (x,) = images(1)
        assert torch.equal(run(x, w, y)[0], x * w + y)
    assert len(machine.captures) == len(set(machine.captures)) == 2
    again = Captured(machine.run, [1], 0)
    for _ in range(2):
        again(x, w, y)
    assert machine.captures[2] == machine.captures[1], "graphs of one stream share their memory"
    del run, again
    last = Captured(machine.run, [1], 0)
    for _ in range(2):
        last(x, w, y)
    assert machine.captures[3] not in machine.captures[:3], "memory that no graph uses any more is given back"


def test_a_stream_that_is_captured_gets_the_kernels_themselves(machine):
    run, w, y = Captured(machine.run, [1], 0), torch.randn(3, 1, 1), torch.randn(2, 3, 4, 5)
    machine.is_capturing = True
    for x in images(3):
        assert torch.equal(run(x, w, y)[0], x * w + y)
    assert not machine.captures


def test_a_capture_that_fails_is_tried_again(machine):
    failing = [False, True, False, False]

    def body(*arguments):
        if failing.pop(0):
            raise torch.OutOfMemoryError("no")
        return machine.run(*arguments)

    run, w, y = Captured(body, [1], 0), torch.randn(3, 1, 1), torch.randn(2, 3, 4, 5)
    (x,) = images(1)
    run(x, w, y)
    with pytest.raises(torch.OutOfMemoryError):
        run(x, w, y)
    machine.recording = None
    assert torch.equal(run(x, w, y)[0], x * w + y) and machine.replays == 1


class Plain(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Writes(Plain):
    def forward(self, x):
        x.add_(1)
        return super().forward(x)


class GivesOut(Plain):
    def forward(self, x):
        return super().forward(x), x.view(-1)


class Large(Plain):
    def forward(self, x):
        return super().forward(x).expand(1 << 17, -1, -1) + 1


class Expanded(Plain):
    def forward(self, x):
        return super().forward(x) + 1


OBSTACLES = [
    (Plain, None),
    (Writes, "it writes to its inputs"),
    (GivesOut, "its results share memory with others"),
    (Large, "its results are large"),
    (Expanded, "an input of it has elements that share memory"),
]


@pytest.mark.parametrize(("model", "why"), OBSTACLES, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("warm", [False, True])
def test_what_is_left_to_inductor(model, why, warm, monkeypatch, caplog, empty_cache):
    """On the CPU, which is taken for a GPU: what is compiled for which, with Inductor's cache too."""
    made = []

    class Note(Captured):
        def __init__(self, run, static, device):
            made.append(list(static))
            self.run = run

        def __call__(self, *arguments):
            return self.run(*arguments)

    monkeypatch.setattr(cuda_graph, "Captured", Note)
    monkeypatch.setattr(on_gpu, "is_on_gpu", lambda values: True)
    monkeypatch.setattr(on_gpu, "calls_of", lambda graph, static: [])
    monkeypatch.setattr(on_gpu, "device_of", lambda values: torch.device("cuda", 0))
    is_cuda = property(lambda _: True)
    obstacle = cuda_graph.obstacle

    def judged(graph, metadata):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", is_cuda)
            return obstacle(graph, metadata)

    monkeypatch.setattr(cuda_graph, "obstacle", judged)
    ran, run_passes = [], backend.passes.run
    monkeypatch.setattr(backend.passes, "run", lambda *given: (ran.append(given), run_passes(*given)))
    net = model(4, 3).eval()
    for _ in range(1 + warm):
        torch._dynamo.reset()
        made.clear()
        caplog.clear()
        x = torch.randn(1, 4).expand(2, 4) if model is Expanded else torch.randn(2, 4)
        mine = x.clone()
        with torch.no_grad(), caplog.at_level(logging.INFO, "ai3_compile.backend"):
            found = torch.compile(net, backend="ai3", options={"mode": "reduce-overhead"})(x)
            expected = net(mine)
        torch.testing.assert_close(found, expected)
        assert torch.equal(x, mine), "what it writes to its input is written"
        assert made == ([[0, 1]] if why is None else [])
        assert len(ran) == 1, "once, for what is kept, and not again where Inductor has it in its cache"
        assert ai3.last_report().graphs[-1].obstacle == why
        said = [message for message in caplog.messages if "left to Inductor's CUDA graphs" in message]
        assert said == ([] if why is None else [f"left to Inductor's CUDA graphs: {why}"])
