"""Batches of small images: every thread takes images of its own through neighbouring operations."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ai3_compile
from ai3_compile import core

from .test_ops import identity
from .test_split import RELU, conv, conv_into

core.load()
ops = torch.ops.ai3
GEMM = identity("conv2d", "gemm")
POOL = f"i2 i2 i2 i2 i0 i0 i1 i1 b0 i{identity('maxpool2d')} b1"


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def images(batch: int, channels: int = 4, size: int = 64) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)


def calls(program: str, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """The results, and how many operations this thread ran."""
    with torch.profiler.profile() as profile:
        results = ops.sequence(program, tensors)
    events = [event for event in profile.events() if "[" in event.name and event.name.startswith("ai3::")]
    return results, len(events)


CHAIN = f"relu 1 t0 i{RELU};max_pool2d 2 t1 {POOL};relu 3 t2 i{RELU};return 3"


# 1 MiB an image and its result: a part is one image. The profiler sees the calling thread, which has half of them.
@pytest.mark.parametrize(
    ("batch", "by_thread"),
    [(1, False), (2, True), (3, False), (4, True), (9, False), (10, True), (19, True)],
    ids=["one", "equal", "a third waits", "divides", "a tenth and more waits", "above", "less than a tenth waits"],
)
def test_each_thread_has_images_of_its_own_where_few_wait(batch, by_thread):
    x = images(batch, channels=16, size=96)
    (first,), whole = calls(CHAIN, [x])
    (second,), parts = calls(CHAIN, [x])
    assert whole == 3 and parts == (3 * (batch // 2) if by_thread else 3)
    assert torch.equal(first, F.max_pool2d(x.relu(), 2)) and torch.equal(second, first)
    assert second.stride() == first.stride()


def test_small_images_go_together():
    """Of 4 KiB each all of a thread's: as many calls as there are threads, for each operation."""
    x = images(8, size=16)
    calls(CHAIN, [x])
    (found,), count = calls(CHAIN, [x])
    assert torch.equal(found, F.max_pool2d(x.relu(), 2)) and count <= 2 * 3


def test_large_weights_are_read_once():
    """A 1x1 convolution of 64 KiB of images, with 1 MiB of weights."""
    x, weight = images(4, 512, 4), torch.randn(512, 512, 1, 1)
    program = ";".join([conv(2, 0, 1), conv(3, 2, 1), "return 3"])
    assert [calls(program, [x, weight])[1] for _ in range(2)] == [2, 2]


def test_another_number_of_threads_is_looked_at_anew():
    x = images(6, channels=16, size=96)
    expected = F.max_pool2d(x.relu(), 2)
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        for _ in range(2):
            assert torch.equal(ops.sequence(CHAIN, [x])[0], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_everything_that_a_sequence_does(mode):
    """A concatenation, a residual in place and one apart, a product with a number a channel, a view; what lies in the
    middle is returned too. In enable_grad the weights ask for gradients, which no thread records."""
    batch = 4
    with torch.inference_mode(mode is torch.inference_mode):
        x = images(batch, size=128)
    weight = torch.randn(4, 4, 1, 1, requires_grad=mode is torch.enable_grad)
    adaptive = f"i1 i1 i{identity('adaptiveavgpool2d')} b1"
    program = ";".join(
        [
            "image 2 t0 i-1 i8 i128 i128",
            conv_into(2, 0, 0, 1, GEMM),
            conv_into(2, 4, 0, 1, GEMM),
            "part 3 t2 i0 i4",
            conv(4, 3, 1, residual="o0"),
            conv_into(4, 0, 0, 1, GEMM, adds=True),
            f"adaptive_avg_pool2d 5 t4 {adaptive}",
            "mul 6 t4 t5",
            f"max_pool2d 7 t6 {POOL}",
            f"adaptive_avg_pool2d 8 t7 {adaptive}",
            "view 9 t8 i-1 i4",
            "return 2 3 5 7 9",
        ]
    )
    with mode():
        first, _ = calls(program, [x, weight])
        second, parts = calls(program, [x, weight])
    assert parts == 7 * batch // 2
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(first, second))
    assert second[1].data_ptr() == second[0].data_ptr()
    with torch.no_grad():
        x, w = x.double(), weight.double()
        product = F.conv2d(x, w)
        total = F.conv2d(product, w) + x + product
        mean = total.mean((2, 3), keepdim=True)
        pooled = F.max_pool2d(total * mean, 2)
        expected = (torch.cat([product, product], 1), product, mean, pooled, pooled.mean((2, 3)))
    for found, reference in zip(second, expected):
        # Sums of 4 products twice, and of 16384 for the means.
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-5)


def test_an_error_in_a_thread_is_raised_where_the_call_was():
    x, weight = images(4), torch.randn(4, 4, 1, 1)
    program = ";".join([f"relu 2 t0 i{RELU}", conv(3, 2, 1), f"relu 4 t3 i{RELU}", "return 4"])
    expected = calls(program, [x, weight])[0][0]
    with pytest.raises(RuntimeError, match="does not fit a weight"):
        # Of as many elements and dimensions: it is not looked at anew.
        ops.sequence(program, [x, weight.reshape(8, 2, 1, 1)])
    assert torch.equal(ops.sequence(program, [x, weight])[0], expected)


def test_calls_from_several_threads_at_once():
    x = images(4, channels=16, size=96)
    expected = F.max_pool2d(x.relu(), 2)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not torch.equal(ops.sequence(CHAIN, [x])[0], expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("batch", [2, 10])
def test_a_network_is_the_same_bit_for_bit(batch):
    """An inverted residual block with squeeze and excitation, twice."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand, self.depthwise = nn.Conv2d(8, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
            self.squeeze, self.excite, self.project = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.hardswish(self.depthwise(F.hardswish(self.expand(x))))
            scale = F.hardsigmoid(self.excite(self.squeeze(F.adaptive_avg_pool2d(y, 1)).relu()))
            return x + self.project(y * scale)

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), Block(), Block()).eval(), images(batch, 3, 96)
    with torch.inference_mode():
        converted = ai3_compile.convert(model, sample_input_shape=tuple(x.shape))
        first, second = converted(x), converted(x)
        assert torch.equal(first, second) and first.stride() == second.stride()
        torch.testing.assert_close(second, model(x), rtol=1e-4, atol=1e-5)
