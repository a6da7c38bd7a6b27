"""Neighbouring operations as one call: the operation that runs them, the pass that finds them, and whole models."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ai3_compile
from ai3_compile import core
from ai3_compile.passes import sequence
from ai3_compile.testing import references

from .test_backend import RESTS, compiled
from .test_ops import identity
from .test_passes import capture, count

core.load()
ops = torch.ops.ai3
RELU, POOL = identity("relu"), identity("maxpool2d")
# relu, pooled, and an image of what is pooled before and behind the relu.
PROGRAM = ";".join(
    (
        f"relu 1 t0 i{RELU}",
        f"max_pool2d 2 t1 i2 i2 i2 i2 i0 i0 i1 i1 b0 i{POOL} b1",
        "image 3 t0 i-1 i8 i4 i4",
        f"max_pool2d_into - t3 i4 t1 i2 i2 i2 i2 i0 i0 i1 i1 b0 i{POOL}",
        f"max_pool2d_into - t3 i0 t0 i2 i2 i2 i2 i0 i0 i1 i1 b0 i{POOL}",
        "return 1 3 2",
    )
)


class Branches(nn.Module):
    """A squeeze and an expansion as in SqueezeNet, whose concatenation is written in place, between what is torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.left = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 5, 1)
        self.right, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(11, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.squeeze(x).relu()
        return self.last(torch.cat([self.left(y).relu(), self.right(y).relu()], 1))


def image(batch: int = 2) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, 4, 8, 8)


def branches() -> nn.Module:
    torch.manual_seed(0)
    return Branches().eval()


def test_a_program_is_one_line(monkeypatch):
    """Inductor copies it into a comment of the code that it writes for a GPU."""
    programs, join = [], sequence._join

    def joined(graph, *rest):
        join(graph, *rest)
        programs.extend(n.args[0] for n in graph.find_nodes(op="call_function", target=ops.sequence.default))

    monkeypatch.setattr(sequence, "_join", joined)
    with torch.no_grad():
        torch.compile(branches(), backend="ai3", options={"rest": "eager"})(image())
    assert programs and not any("\n" in program for program in programs)


def test_opcheck():
    torch.library.opcheck(ops.sequence.default, (PROGRAM, [image().to(memory_format=torch.channels_last)]))


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_program_computes_what_its_operations_do(batch):
    x = image(batch).to(memory_format=torch.channels_last)
    relu, whole, pooled = ops.sequence(PROGRAM, [x])
    assert torch.equal(relu, x.relu()) and torch.equal(pooled, F.max_pool2d(x.relu(), 2))
    assert torch.equal(whole, torch.cat([F.max_pool2d(x, 2), pooled], 1))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("sine 1 t0;return 1", "sine is not an operation"),
        (f"relu 1 x0 i{RELU};return 1", "x0 is not an argument"),
        ("relu 1 t0 i1.5;return 1", "1.5 is not a number"),
        (f"relu 1 t4 i{RELU};return 1", "there is no value 4"),
        (f"relu 1 t0 i{RELU};return 2", "there is no value 2"),
        (f"relu 1 t2 i{RELU};relu 2 t0 i{RELU};return 1", "value 2 is read before it is computed"),
        ("relu 1 t0;return 1", "these are no arguments for relu"),
        (f"relu 1 t0 i{RELU} i0;return 1", "these are no arguments for relu"),
        (f"relu 1 i0 i{RELU};return 1", "these are no arguments for relu"),
        (f"relu 1 o0 i{RELU};return 1", "these are no arguments for relu"),
        ("relu 1 t0 t0;return 1", "these are no arguments for relu"),
        ("mul 1 t0 i1;return 1", "these are no arguments for mul"),
        ("view 1 t0 t0;return 1", "these are no arguments for view"),
    ],
)
def test_a_program_that_makes_no_sense_is_an_error_that_says_where(program, message):
    with pytest.raises(RuntimeError, match=message):
        ops.sequence(program, [image()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("channels", [1, 3, 8, 16, 19, 300])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_product_is_torchs_bit_for_bit(dtype, channels, batch):
    """Of an image with a number a channel, in either order, which is computed here; of another layout, with a number a
    pixel, with one in all and with fewer dimensions, which are torch's. 300 channels are more than a thread's share."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, 13, 9).mul(100).to(dtype).to(memory_format=torch.channels_last)
    shapes = [(batch, channels, 1, 1), (1, channels, 1, 1), (batch, 1, 13, 9), (1,), x.shape]
    for scale in (torch.randn(shape).mul(100).to(dtype) for shape in shapes):
        for image in (x, x.contiguous(), x[:, :, 1:], x.flip(3)):
            if image.shape[2] != scale.shape[min(2, scale.dim() - 1)] != 1:
                continue
            for pair in ([image, scale], [scale, image]):
                (found,) = ops.sequence("mul 2 t0 t1;return 2", pair)
                expected = pair[0] * pair[1]
                assert torch.equal(found, expected) and found.dtype == dtype
                if image is x and scale.shape == shapes[0]:
                    assert found.stride() == expected.stride()


def test_a_product_propagates_what_is_not_a_number():
    x = torch.tensor([float("nan"), float("inf"), 0.0, -1.0] * 5).view(1, 20, 1, 1).expand(1, 20, 2, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    scale = torch.tensor([2.0, 0.0, float("inf"), -0.0] * 5).view(1, 20, 1, 1)
    (found,) = ops.sequence("mul 2 t0 t1;return 2", [x, scale])
    torch.testing.assert_close(found, x * scale, rtol=0, atol=0, equal_nan=True)


def test_values_are_let_go_of_behind_their_last_use():
    """Thirty images one after another never lie in memory together."""
    x = torch.randn(1, 4, 512, 512)
    lines = [f"relu {i + 1} t{i} i{RELU}" for i in range(30)]
    program = ";".join([*lines, "return 30"])
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.sequence(program, [x])
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 2 * x.nbytes <= most <= 3 * x.nbytes


def test_a_refusal_names_the_algorithm_and_frees_what_was_computed():
    broken = f"relu 1 t0 i{RELU};max_pool2d 2 t1 i99 i99 i2 i2 i0 i0 i1 i1 b0 i{POOL} b1;return 2"
    for _ in range(3):
        with pytest.raises(RuntimeError, match="ai3::max_pool2d: the window is larger"):
            ops.sequence(broken, [image()])


def test_neighbours_and_the_images_they_write_into_become_one_call():
    seen = capture(branches(), image(), conv2d="direct")
    assert count(seen["concat"], "conv2d_into") == 2 and count(seen["concat"], "empty_strided") == 1
    assert count(seen["sequence"], "ai3.sequence") == 1
    assert count(seen["sequence"], "ai3.conv2d") == 0 and count(seen["sequence"], "empty_strided") == 0


def test_what_is_torchs_parts_them():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.MaxPool2d(2))
    seen = capture(model.eval(), image())
    assert count(seen["sequence"], "ai3.sequence") == 2 and count(seen["sequence"], "aten.tanh") == 1


def test_an_image_that_torch_writes_into_too_stays_outside():
    class Mixed(Branches):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.squeeze(x).relu()
            return self.last(torch.cat([self.left(y).relu().tanh(), self.right(y).relu()], 1))

    torch.manual_seed(0)
    seen = capture(Mixed().eval(), image(), conv2d="direct")
    assert count(seen["sequence"], "ai3.conv2d_into") == 1 and count(seen["sequence"], "empty_strided") == 1


def test_one_operation_alone_and_unfused_graphs_stay_as_they_are():
    alone = capture(nn.Sequential(nn.Conv2d(4, 4, 1)).eval(), image())
    assert count(alone["sequence"], "ai3.conv2d") == 1 and count(alone["sequence"], "ai3.sequence") == 0
    apart = capture(branches(), image(), conv2d="direct", fuse=False)
    assert count(apart["sequence"], "ai3.conv2d") == 4 and count(apart["sequence"], "ai3.sequence") == 0


@pytest.mark.parametrize("rest", RESTS)
def test_any_batch(rest):
    model = branches()
    torch._dynamo.reset()
    f = compiled(model, rest=rest)
    with torch.inference_mode():
        for batch in (2, 5, 3):
            x = image(batch)
            # Two sums of a dozen products: 1e-6 each at most.
            assert references.relative_error(f(x), model(x)) < 1e-5


@pytest.mark.parametrize("rest", RESTS)
def test_weights_that_change_are_seen(rest):
    model, x = branches(), image()
    torch._dynamo.reset()
    f = compiled(model, rest=rest)
    with torch.no_grad():
        assert references.relative_error(f(x), model(x)) < 1e-5
        model.left.weight.mul_(3)
        assert references.relative_error(f(x), model(x)) < 1e-5


def test_every_operation_keeps_its_label_in_a_profile():
    converted = ai3_compile.convert(branches(), {"conv2d": "direct"}, sample_input_shape=(2, 4, 8, 8))
    x = image()
    converted(x)
    with torch.profiler.profile() as profile:
        converted(x)
    found = {event.key: event.count for event in profile.key_averages()}
    assert found["ai3::conv2d[direct@cpp]"] == 4 and found[sequence.OP_NAME] == 1


class Excited(nn.Module):
    """Squeeze and excitation between convolutions, and a classifier behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 1)
        self.squeeze, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.classify = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        scale = F.hardsigmoid(self.excite(self.squeeze(F.adaptive_avg_pool2d(y, 1)).relu()))
        return self.classify(F.adaptive_avg_pool2d(self.last(scale * y), 1).flatten(1))


@pytest.mark.parametrize("rest", RESTS)
def test_products_and_views_between_operations_belong_to_the_sequence(rest):
    torch.manual_seed(0)
    model = Excited().eval()
    seen = capture(model, image(), rest=rest)
    assert count(seen["sequence"], "ai3.sequence") == 1
    assert count(seen["sequence"], "aten.mul") == count(seen["sequence"], "aten.view") == 0
    torch._dynamo.reset()
    f = compiled(model, rest=rest)
    with torch.inference_mode():
        for batch in (2, 5, 3):
            # Sums of at most a dozen products, one behind another: 1e-6 each.
            assert references.relative_error(f(image(batch)), model(image(batch))) < 1e-5


class Residual(nn.Module):
    """conv(...) + r, with r and what else reads it by `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.again = kind, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        r = self.first(x).relu()
        if self.kind == "input":
            return self.last(self.again(r) + r)
        y = self.again(r).relu()
        y = self.last((self.again(y) + (x if self.kind == "given" else r)).relu())
        return torch.cat([y, r], 1).tanh() if self.kind == "read later" else y


# By what the residual is: whether the sum takes its place.
RESIDUALS = {"read before": True, "read later": False, "given": False, "input": False}


@pytest.mark.parametrize("kind", RESIDUALS)
def test_a_sum_takes_the_place_of_a_residual_that_nothing_reads_any_more(kind, monkeypatch):
    model, taken, find = Residual(kind).eval(), [], sequence._overwritten
    monkeypatch.setattr(sequence, "_overwritten", lambda *given: taken.append(find(*given)) or taken[-1])
    torch._dynamo.reset()
    f = compiled(model, conv2d="gemm", rest="eager")
    x = image().to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.inference_mode():
        # Four sums of at most 36 products, one behind another: 1e-6 each.
        assert references.relative_error(f(x), model(x)) < 1e-5
        assert references.relative_error(f(x), model(x)) < 1e-5
    assert torch.equal(x, before)
    assert any(taken) is RESIDUALS[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize(
    "shape", [(2, channels, 7, 13) for channels in (1, 2, 3, 4, 5)] + [(0, 3, 7, 13), (1, 3, 200, 199)]
)
def test_a_copy_in_channels_last_is_torchs_bit_for_bit(shape, dtype):
    """Of two to four channels by rows, 200x199 pixels by two threads; of what is not contiguous by PyTorch."""
    torch.manual_seed(0)
    whole = torch.randn(shape).mul(100).to(dtype)
    for image in (
        whole,
        whole[:, :, 1:],
        whole.flip(3),
        whole.transpose(2, 3),
        whole.to(memory_format=torch.channels_last),
    ):
        (found,) = ops.sequence("channels_last 1 t0;return 1", [image])
        expected = image.clone(memory_format=torch.channels_last)
        assert torch.equal(found, expected) and found.stride() == expected.stride()
        assert found.numel() == 0 or found.data_ptr() != image.data_ptr()


def test_the_copy_of_the_input_belongs_to_the_sequence():
    seen = capture(branches(), image(), conv2d="direct")
    assert count(seen["layout"], "aten.clone") == 2  # and the output's, in the input's layout
    assert count(seen["sequence"], "aten.clone") == 1
    assert count(seen["sequence"], "ai3.sequence") == 1
