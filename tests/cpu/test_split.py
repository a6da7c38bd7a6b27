"""Batches of images that the cache does not hold: operations run for some of the images at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ai3_compile
from ai3_compile import core

from .test_ops import identity

core.load()
ops = torch.ops.ai3
RELU, POOL, CONV = identity("relu"), identity("maxpool2d"), identity("conv2d", "direct")
# No operation on one such image and its result, 16 MiB each, is taken for what stays in cache.
CHANNELS, SIZE = 4, 1024
WINDOW = "i1 i1 i1 i1 i0 i0 i1 i1 b0"  # of one pixel


def images(batch: int, channels: int = CHANNELS, size: int = SIZE) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)


def conv(result: int, source: int, weight: int, residual: str = "n", static: bool = True) -> str:
    """A 1x1 convolution without bias, as the pass writes it."""
    window, norms = "i1 i1 i0 i0 i0 i0 i1 i1 i1", "n n n n d0 n n n n d0 i0"
    return f"conv2d {result} t{source} t{weight} n {window} i{CONV} b1 b{int(static)} {residual} i0 {norms}"


def conv_into(image: int, channel: int, source: int, weight: int, algorithm: int, adds: bool = False) -> str:
    window = "i1 i1 i0 i0 i0 i0 i1 i1 i1"
    rest = f"i{algorithm} b1 i0 n n n n d0 b{int(adds)}"
    return f"conv2d_into - t{image} i{channel} t{source} t{weight} n {window} {rest}"


def calls(program: str, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """The results, and how many operations ran."""
    with torch.profiler.profile() as profile:
        results = ops.sequence(program, tensors)
    return results, sum("[" in event.name and event.name.startswith("ai3::") for event in profile.events())


def test_operations_run_for_some_images_at_a_time_once_the_sizes_are_known():
    """Each image for itself here: the second call has as many operations for every image as the first has in all."""
    x = images(3)
    program = f"relu 1 t0 i{RELU};max_pool2d 2 t1 {WINDOW} i{POOL} b1;relu 3 t2 i{RELU};return 3"
    (first,), whole = calls(program, [x])
    (second,), split = calls(program, [x])
    assert (whole, split) == (3, 9)
    assert torch.equal(first, x.relu()) and torch.equal(second, first) and second.stride() == first.stride()


@pytest.mark.parametrize("shape", [(1, CHANNELS, SIZE, SIZE), (3, SIZE, SIZE), (3, CHANNELS, 8, 8), (0, 4, SIZE, SIZE)])
def test_one_image_and_small_images_run_whole(shape):
    """A batch of one or none, an image without a batch whose channels are no images, and what the cache holds."""
    x = torch.randn(shape)
    program = f"relu 1 t0 i{RELU};max_pool2d 2 t1 {WINDOW} i{POOL} b0;return 2"
    expected, whole = calls(program, [x])
    found, split = calls(program, [x])
    assert whole == split <= 2 and torch.equal(found[0], expected[0])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_images_that_are_some_of_a_larger_batch(layout):
    """They begin inside their storage; what is left of it behind them is not theirs."""
    x = images(5).contiguous(memory_format=layout)[1:4]
    program = f"relu 1 t0 i{RELU};max_pool2d 2 t1 {WINDOW} i{POOL} b1;return 1 2"
    for _ in range(2):
        relu, pooled = ops.sequence(program, [x])
        assert torch.equal(relu, x.relu()) and torch.equal(pooled, relu) and relu.stride() == x.stride()


def test_weights_that_are_not_kept_are_packed_once():
    x, weight = images(2), torch.randn(CHANNELS, CHANNELS, 1, 1)
    program = ";".join([f"relu 2 t0 i{RELU}", conv(3, 2, 1, static=False), f"relu 4 t3 i{RELU}", "return 4"])
    assert [calls(program, [x, weight])[1] for _ in range(2)] == [3, 3]


def test_an_image_that_is_kept_for_a_part_of_it():
    """Nothing behind the split steps reads the image itself, only some of its channels, which lie in it."""
    x, weight = images(2), torch.randn(2, CHANNELS, 1, 1)
    program = ";".join(
        [
            f"image 2 t0 i-1 i8 i{SIZE} i{SIZE}",
            f"max_pool2d_into - t2 i4 t0 {WINDOW} i{POOL}",
            "part 3 t2 i4 i8",
            f"max_pool2d_into - t2 i0 t0 {WINDOW} i{POOL}",
            f"relu 4 t2 i{RELU}",
            f"relu 5 t1 i{RELU}",
            conv(6, 3, 5),  # its weight is computed
            "return 6 4",
        ]
    )
    for _ in range(2):
        found, relu = ops.sequence(program, [x, weight])
        torch.testing.assert_close(found, F.conv2d(x, weight.relu()), rtol=1e-6, atol=1e-6)
        assert torch.equal(relu, torch.cat([x, x], 1).relu())


def test_a_part_of_an_image_from_before():
    """The image is made before the split steps, which write into it and read channels of it."""
    x, weight = images(2), torch.randn(CHANNELS, CHANNELS, 1, 1)
    program = ";".join(
        [
            f"relu 2 t1 i{RELU}",
            conv(3, 0, 2),
            f"image 4 t0 i2 i8 i{SIZE} i{SIZE}",
            f"max_pool2d_into - t4 i0 t3 {WINDOW} i{POOL}",
            f"relu 5 t2 i{RELU}",  # of another batch: what is before and what follows are split each for itself
            "part 6 t4 i4 i8",
            f"max_pool2d_into - t4 i4 t0 {WINDOW} i{POOL}",
            "part 7 t4 i4 i8",
            f"max_pool2d 8 t6 {WINDOW} i{POOL} b1",
            f"relu 9 t7 i{RELU}",
            "return 4 6 7 8 9",
        ]
    )
    for _ in range(2):
        whole, before, after, pooled, relu = ops.sequence(program, [x, weight])
        torch.testing.assert_close(whole[:, :4], F.conv2d(x, weight.relu()), rtol=1e-6, atol=1e-6)
        assert all(torch.equal(found, x) for found in (whole[:, 4:], before, after, pooled))
        assert torch.equal(relu, x.relu())


def test_the_same_program_in_another_layout():
    """A result in the middle has its input's layout."""
    program = f"relu 1 t0 i{RELU};max_pool2d 2 t1 {WINDOW} i{POOL} b1;return 1 2"
    for layout in (torch.channels_last, torch.contiguous_format, torch.channels_last):
        x = images(2).contiguous(memory_format=layout)
        for _ in range(2):
            relu, _ = ops.sequence(program, [x])
            assert torch.equal(relu, x.relu()) and relu.stride() == x.stride()


def test_other_sizes_are_looked_at_anew():
    program = f"relu 1 t0 i{RELU};max_pool2d 2 t1 {WINDOW} i{POOL} b1;return 2"
    assert [calls(program, [images(batch)])[1] for batch in (2, 2, 3, 3, 2)] == [2, 4, 2, 6, 4]


def test_what_is_read_behind_the_split_steps_is_whole():
    """A result in the middle, an image with channels written inside and outside, a part of it made before both."""
    x, weight = images(3), torch.randn(2, CHANNELS, 1, 1)
    program = ";".join(
        [
            f"image 2 t0 i-1 i6 i{SIZE} i{SIZE}",
            f"relu 3 t0 i{RELU}",
            "part 4 t2 i0 i4",
            f"max_pool2d_into - t2 i0 t3 {WINDOW} i{POOL}",
            f"max_pool2d 5 t4 {WINDOW} i{POOL} b1",
            # What follows cannot be split, as its weight is computed: the steps end here.
            f"relu 6 t1 i{RELU}",
            conv_into(2, 4, 3, 6, CONV),
            "return 2 3 4 5",
        ]
    )
    first, _ = calls(program, [x, weight])
    second, _ = calls(program, [x, weight])
    expected = torch.cat([x.relu(), F.conv2d(x.relu(), weight.relu())], 1)
    for image, relu, part, pooled in (first, second):
        torch.testing.assert_close(image, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(relu, x.relu()) and torch.equal(part, image[:, :4]) and torch.equal(pooled, relu)
    assert second[2].data_ptr() == second[0].data_ptr()  # still a part of it
    assert [t.stride() for t in first] == [t.stride() for t in second]


@pytest.mark.parametrize("batch", [2, 3])
def test_sums_products_and_views(batch):
    """A residual, one that its sum takes the place of, a product with one number a channel, and a view by the batch's
    size and by what is left."""
    x, weight = images(batch), torch.randn(CHANNELS, CHANNELS, 1, 1)
    program = ";".join(
        [
            conv(2, 0, 1),
            conv(3, 2, 1, residual="o0"),
            conv_into(3, 0, 2, 1, identity("conv2d", "gemm"), adds=True),
            f"adaptive_avg_pool2d 4 t3 i1 i1 i{identity('adaptiveavgpool2d')} b1",
            "mul 5 t3 t4",
            f"max_pool2d 6 t5 {WINDOW} i{POOL} b1",
            f"view 7 t4 i{batch} i{CHANNELS}",
            f"adaptive_avg_pool2d 8 t6 i1 i1 i{identity('adaptiveavgpool2d')} b1",
            f"view 9 t8 i-1 i{CHANNELS}",
            f"relu 10 t6 i{RELU}",
            "return 7 9 10",
        ]
    )
    first, whole = calls(program, [x, weight])
    second, split = calls(program, [x, weight])
    assert split > whole
    product = F.conv2d(x, weight)
    total = F.conv2d(product, weight) * 2 + x
    mean = total.mean((2, 3), keepdim=True)
    for found in (first, second):
        for tensor, expected in zip(found, (mean.flatten(1), (total * mean).mean((2, 3)), (total * mean).relu())):
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)


def test_an_error_in_the_middle_frees_what_was_computed():
    """A weight of other sizes than when the program was first run."""
    x, weight = images(2), torch.randn(CHANNELS, CHANNELS, 1, 1)
    program = ";".join([f"relu 2 t0 i{RELU}", conv(3, 2, 1), f"relu 4 t3 i{RELU}", "return 4"])
    calls(program, [x, weight])
    with pytest.raises(RuntimeError, match="does not fit a weight"):
        ops.sequence(program, [x, torch.randn(CHANNELS, 3, 1, 1)])
    assert calls(program, [x, weight])[1] == 6
    # Other sizes of its own results are another matter than an error.
    (wider,), _ = calls(program, [x, torch.cat([weight, weight])])
    assert wider.shape[1] == 2 * CHANNELS


@pytest.mark.parametrize("entry", ["compile", "convert"])
def test_networks_whose_first_layers_are_split(entry):
    """Convolutions of large images, with a residual, a concatenation and a pool, then small ones and a linear: the
    same as eager's in float64, and bit for bit the same whether split or not."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 24, 3, padding=1)
            self.last, self.classifier = nn.Conv2d(32, 8, 3, stride=2), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).relu()
            x = F.max_pool2d((x + self.second(x)).relu(), 2)
            x = F.max_pool2d(torch.cat([self.left(x), self.right(x)], 1), 4)
            return self.classifier(F.adaptive_avg_pool2d(self.last(x), 1).flatten(1))

    torch.manual_seed(0)
    model, x = Network().eval(), torch.randn(3, 3, 512, 512)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
    with torch.inference_mode():
        if entry == "compile":
            found = torch.compile(model, backend="ai3", options={"rest": "eager"})
        else:
            found = ai3_compile.convert(model, sample_input_shape=tuple(x.shape))
        counts: list[int] = []
        results: list[torch.Tensor] = []
        for _ in range(2):
            with torch.profiler.profile() as profile:
                results.append(found(x))
            counts.append(sum("[" in event.name and event.name.startswith("ai3::") for event in profile.events()))
    first, second = results
    assert counts[1] > counts[0] and torch.equal(first, second)
    # Sums of up to 144 products four layers deep, by Winograd too: some units in the last place of the largest.
    assert (second.double() - expected).abs().max() <= 2e-6 * expected.abs().max()
