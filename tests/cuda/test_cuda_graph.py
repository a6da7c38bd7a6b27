"""Networks as CUDA graphs of ai3's own: results that stay, weights that change, streams, threads, memory."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import ai3_compile as ai3
from ai3_compile import cuda_graph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Of max|y - reference| / max|reference| in float16, of two convolutions and a linear.
LIMIT = 5e-3


@pytest.fixture(autouse=True)
def nothing_stays():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def net() -> nn.Sequential:
    convolutions = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64)
    rest = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(*convolutions, *rest).cuda().half().eval()


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, device="cuda").half()


def compiled(model: nn.Module):
    return torch.compile(model, backend="ai3", options={"mode": "reduce-overhead"})


def is_right(found: torch.Tensor, model: nn.Module, x: torch.Tensor) -> bool:
    with torch.no_grad():
        expected = model(x)
    return float((found - expected).abs().max() / expected.abs().max()) < LIMIT


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_are_not_overwritten(mode, layout):
    model = net()
    run = compiled(model)
    with mode():
        images = [image().contiguous(memory_format=layout) for _ in range(6)]
        found = [run(x) for x in images]
    assert ai3.last_report().graphs[-1].obstacle is None
    assert all(is_right(y, model, x) for y, x in zip(found, images))


@pytest.fixture
def captures(monkeypatch):
    """How many inputs each graph copies, in the order of their captures."""
    counts: list[int] = []
    capture = cuda_graph._Graphs._capture

    def counted(self, arguments, copied):
        counts.append(len(copied))
        return capture(self, arguments, copied)

    monkeypatch.setattr(cuda_graph._Graphs, "_capture", counted)
    return counts


def test_inputs_are_read_where_they_lie_when_they_lie_there_again(captures):
    model, x, other = net(), image(), image()
    run = compiled(model)
    with torch.no_grad():
        for _ in range(4):
            x.copy_(image())
            assert is_right(run(x), model, x)
        assert captures == [0]
        for _ in range(3):  # a second place is copied from at first
            for there in (x, other):
                there.copy_(image())
                assert is_right(run(there), model, there)
        assert captures == [0, 1, 0]


def test_inputs_that_never_lie_there_again_are_copied(captures):
    model = net()
    run = compiled(model)
    images = [image() for _ in range(12)]
    with torch.no_grad():
        assert all(is_right(run(x), model, x) for x in images)
        assert captures == [1]
        for x in (x for x in images for _ in range(3)):
            assert is_right(run(x), model, x)
    assert captures == [1] + [0] * 4  # and no more than four places


def test_an_input_between_the_units_of_memory_is_copied(captures):
    model = net()
    run = compiled(model)
    memory = torch.zeros(2 * 3 * 32 * 32 + 1, device="cuda", dtype=torch.float16)
    x = memory[1:].view(2, 3, 32, 32)
    with torch.no_grad():
        for _ in range(4):
            x.copy_(image())
            assert is_right(run(x), model, x)
    assert captures == [1]


def test_what_is_read_where_it_lies_is_not_held(captures):
    model = net()
    run = compiled(model)
    with torch.no_grad():
        for _ in range(10):
            before = torch.cuda.memory_allocated()
            x = image(64)
            found = run(x)
            assert is_right(found, model, x)
            del x, found
    assert 0 in captures and torch.cuda.memory_allocated() == before


def test_weights_that_change_and_move():
    model, x = net(), image()
    run = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            run(x)
        model[0].weight.mul_(-1)
        assert is_right(run(x), model, x)
        model[2].weight.data = model[2].weight.data.flip(0).clone()
        for _ in range(3):
            assert is_right(run(x), model, x)
        model[7].weight = nn.Parameter(torch.randn_like(model[7].weight))
        for _ in range(3):
            assert is_right(run(x), model, x)


def test_streams_and_threads():
    """Each thread on a stream of its own, and then all on one."""
    model = net()
    run = compiled(model)
    with torch.no_grad():
        run(image())
    images = [image() for _ in range(20)]  # random numbers are refused in all threads while one captures
    right: list[bool] = []

    def work(stream: torch.cuda.Stream) -> None:
        with torch.no_grad(), torch.cuda.stream(stream):
            for x in images:
                x = x.clone()
                right.append(is_right(run(x), model, x))

    torch.cuda.synchronize()

    for streams in ([torch.cuda.Stream() for _ in range(3)], [torch.cuda.Stream()] * 3):
        threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(right) == 6 * len(images) and all(right)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device_while_the_first_is_current():
    for device in ("cuda:0", "cuda:1"):
        model = net().to(device)
        run = compiled(model)
        with torch.no_grad():
            for _ in range(4):
                x = image().to(device)
                found = run(x)
                assert found.device == x.device and is_right(found, model, x)


def test_calls_hold_no_memory():
    model, x = net(), image(8)
    run = compiled(model)
    with torch.no_grad():
        for _ in range(5):
            run(x)
        before = torch.cuda.memory_allocated()
        for _ in range(50):
            run(x)
        assert torch.cuda.memory_allocated() == before


def test_within_a_capture_of_the_users_own():
    model, x = net(), image()
    run = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            run(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(x)
        x.copy_(image())
        graph.replay()
        assert is_right(found, model, x)


def test_what_is_left_to_inductor(caplog):
    model = net()[:3]
    run = compiled(model)
    with torch.no_grad(), caplog.at_level("INFO", "ai3_compile.backend"):
        for _ in range(3):
            x = image(64)
            assert is_right(run(x), model, x)
    assert "left to Inductor's CUDA graphs: its results are large" in caplog.messages
