"""Concatenations that are written in place: the operations that write into slices, the pass, and whole models."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ai3_compile
from ai3_compile import core
from ai3_compile.testing import harness, references

from .test_backend import RESTS, compiled
from .test_ops import identity
from .test_passes import capture, count

core.load()
ops = torch.ops.ai3

WRITERS = [a.name for a in harness.algorithms("conv2d") if harness.table_of(a).flags & harness.abi.STRIDED_OUTPUT]
# A float32 sum of some dozens of products, twice in a row: each errs by 1e-6 at most, Winograd's by 5e-6.
BOUND = 1e-5


def larger(channels: int, like: torch.Tensor) -> torch.Tensor:
    """An image of more channels, every element of it 7."""
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.full(shape, 7.0, dtype=like.dtype).to(memory_format=torch.channels_last)


def calls(name: str, algorithm: str = "direct", dtype: torch.dtype = torch.float32, batch: int = 2):
    """The arguments of an operation of four channels and of the one that writes into a slice, besides the slice."""
    torch.manual_seed(0)
    x = torch.randn(batch, 4, 9, 11, dtype=dtype)
    if name == "max_pool2d":
        return (x, 3, 3, 2, 2, 1, 1, 1, 1, True, identity("maxpool2d")), {}
    if name == "avg_pool2d":
        return (x, 3, 3, 2, 2, 1, 1, True, False, 0, identity("avgpool2d")), {}
    w, b, norm = torch.randn(4, 4, 3, 3, dtype=dtype), torch.randn(4, dtype=dtype), torch.rand(4, 4, dtype=dtype) + 0.5
    named = {"activation": 1, **dict(zip(("bn_weight", "bn_bias", "bn_mean", "bn_var"), norm)), "bn_eps": 1e-3}
    return (x, w, b, *(1,) * 9, identity("conv2d", algorithm)), named


@pytest.mark.parametrize("name", ["conv2d", "max_pool2d", "avg_pool2d"])
def test_opcheck(name):
    args, named = calls(name)
    image = larger(9, getattr(ops, name)(*args, **named))
    torch.library.opcheck(getattr(ops, f"{name}_into").default, (image, 3, *args), named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d", *(f"conv2d {name}" for name in WRITERS)])
def test_a_slice_gets_what_the_operation_gives_and_nothing_else_changes(name, batch, dtype):
    """The same arithmetic, so the same bits."""
    args, named = calls(*name.split(" ", 1), dtype=dtype, batch=batch)
    name = name.split()[0]
    expected = getattr(ops, name)(*args, **named)
    image = larger(9, expected)
    assert getattr(ops, f"{name}_into")(image, 3, *args, **named) is None
    assert torch.equal(image[:, 3:7], expected)
    assert bool((image[:, :3] == 7).all() and (image[:, 7:] == 7).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: (image, 6), "channels 6 to 10 are not among the output's 9"),
        (lambda image: (image, -1), "channels -1 to 3 are not among"),
        (lambda image: (image.contiguous(), 0), "not dense in channels_last"),
        (lambda image: (torch.cat([image, image], 1)[:, :9], 0), "not dense in channels_last"),
        (lambda image: (image[:1], 0), "1 images of 9x11 does not fit a result of 2 images of 9x11"),
        (lambda image: (image[:, :, 1:], 0), "8x11 does not fit"),
        (lambda image: (image.double(), 0), "different dtypes"),
        (lambda image: (image[0], 0), "4 dimensions, got 4 and 3"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(change, message):
    args, named = calls("conv2d")
    image, channel = change(larger(9, args[0]))
    with pytest.raises(RuntimeError, match=f"ai3::conv2d_into: .*{message}"):
        ops.conv2d_into(image, channel, *args, **named)
    assert bool((image == 7).all())


def test_conv2d_adds_to_a_whole_image_or_says_why_not():
    args, named = calls("conv2d", "gemm")
    named["activation"] = 0
    expected = ops.conv2d(*args, **named, channels_last=True)
    image = larger(4, expected)
    torch.library.opcheck(ops.conv2d_into.default, (image.clone(), 0, *args), {**named, "adds": True})
    ops.conv2d_into(image, 0, *args, **named, adds=True)
    assert references.relative_error(image, expected.double() + 7) < BOUND
    with pytest.raises(RuntimeError, match="adds to a whole image only, and this one has 9 channels, not 4"):
        ops.conv2d_into(larger(9, expected), 0, *args, **named, adds=True)
    args, named = calls("conv2d", "smm")
    with pytest.raises(RuntimeError, match=r"conv2d\[smm@cpp\] cannot add to what is there"):
        ops.conv2d_into(image, 0, *args, **named, adds=True)


def test_an_algorithm_that_cannot_write_into_a_slice_is_refused_by_name():
    args, named = calls("conv2d", "smm")
    with pytest.raises(RuntimeError, match=r"conv2d\[smm@cpp\] cannot write into some channels"):
        ops.conv2d_into(larger(9, args[0]), 0, *args, **named)


class Convs(nn.Module):
    """Convolutions of odd numbers of channels, 1x1 but `wide` (3x3) and `fewer` (3x3 of stride 2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.end = nn.Conv2d(3, 6, 3, padding=1), nn.LazyConv2d(5, 3)
        self.a, self.b = nn.Conv2d(6, 7, 1), nn.Conv2d(6, 9, 1)
        self.wide, self.fewer = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 11, 3, 2)
        self.norm = nn.BatchNorm2d(7)
        self.same, self.square = nn.Conv2d(5, 5, 1), nn.Conv2d(16, 16, 1)
        self.layers = nn.ModuleList(nn.Conv2d(6 + 5 * i, 5, 1 + 2 * (i % 2), padding=i % 2) for i in range(4))
        with torch.no_grad():
            self(torch.randn(1, 3, 12, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.joined(self.stem(x).relu()))

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Fire(Convs):
    def joined(self, x):
        return torch.cat([self.norm(self.a(x)).relu(), self.wide(x).relu()], 1)


class Reduction(Convs):
    """A branch is a pool; the height and width are not those of the input."""

    def joined(self, x):
        return torch.cat([F.max_pool2d(x, 3, 2), self.fewer(x), F.avg_pool2d(x, 3, 2)], dim=-3)


class Dense(Convs):
    """Every value is in all concatenations behind it; the last is in one, most of which is others."""

    def joined(self, x):
        a = self.a(x)
        b = self.wide(torch.cat([x, a], 1)[:, :6])
        return torch.cat([x, a, b], 1)


class MostlyCopied(Convs):
    def joined(self, x):
        return torch.cat([x.sigmoid(), x * 2, self.a(x)], 1)


class Mixed(Convs):
    def joined(self, x):
        return torch.cat([self.a(x), x.sigmoid(), self.wide(x) + x[:, :5], self.b(x)], 1)


class Nested(Convs):
    def joined(self, x):
        inner = torch.cat([torch.cat([self.wide(x), self.b(x)], 1), torch.cat([x.exp(), self.b(x * 2)], 1)], 1)
        return torch.cat([self.a(x), inner, F.avg_pool2d(x, 3, 1, 1)], 1)


class InnerUsedTwice(Convs):
    def joined(self, x):
        inner = torch.cat([self.wide(x), self.b(x)], 1)
        return torch.cat([self.a(x), inner], 1) + inner.sum(1, keepdim=True)


class SameTwice(Convs):
    def joined(self, x):
        a, inner = self.a(x), torch.cat([self.wide(x), self.b(x)], 1)
        return torch.cat([torch.cat([a, a, self.b(x)], 1), inner, inner], 1)


class TwoUsers(Convs):
    def joined(self, x):
        a = self.a(x)
        return torch.cat([a, self.b(x)], 1) * a.mean()


class Residual(Convs):
    def joined(self, x):
        return torch.cat([self.wide(x) + x[:, 1:], self.b(x)], 1)


class OtherDims(Convs):
    def joined(self, x):
        return torch.cat([torch.cat([self.a(x), self.a(x * 2)], 2), torch.cat([self.a(x), self.a(x / 2)], 2)], 0)


class OtherTypes(Convs):
    def joined(self, x):
        return torch.cat([self.a(x), x.double()], 1).to(x.dtype)


class NoChannels(Convs):
    def joined(self, x):
        return torch.cat([self.a(x), x[:, :0] + 1, self.b(x)], 1)


class OnePixel(Convs):
    def joined(self, x):
        x = F.adaptive_avg_pool2d(x, 1)
        return torch.cat([self.a(x), self.b(x)], 1).expand(-1, -1, 4, 4)


# By model: how many operations write into a slice, how many values are copied into one, and how many concatenations
# stay.
MODELS = {
    Fire: (2, 0, 0),
    Reduction: (3, 0, 0),
    Dense: (0, 0, 2),
    MostlyCopied: (0, 0, 1),
    Mixed: (2, 2, 0),
    Nested: (5, 1, 0),
    InnerUsedTwice: (2, 0, 1),
    SameTwice: (2, 0, 2),
    TwoUsers: (1, 1, 0),
    Residual: (1, 1, 0),
    OtherDims: (0, 0, 3),
    OtherTypes: (0, 0, 1),
    NoChannels: (0, 0, 1),  # what has no channels is contiguous, and then so is the whole
    OnePixel: (2, 0, 0),
}
EACH = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


class Growing(Convs):
    """As DenseNet: each layer reads what all layers before it wrote, the first of them alone."""

    def joined(self, x):
        found = [F.max_pool2d(x, 2)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)).relu())
        return torch.cat(found, 1)


class GrowingNested(Growing):
    def joined(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class GrowingFromTheEnd(Growing):
    """What is new comes first, so that the channels a layer reads are the last."""

    def joined(self, x):
        x = F.avg_pool2d(x, 1)
        for layer in self.layers:
            x = torch.cat([layer(x), x], 1)
        return x


class GrowingBetween(Growing):
    """PyTorch computes between two writes to the image, which only the order of the graph keeps apart."""

    def joined(self, x):
        for layer in self.layers:
            x = torch.cat([x, self.same(layer(x).cos())], 1)
        return x


class GrowingReadElsewhere(Growing):
    """What PyTorch reads is the end of an image, as what is concatenated with it would be copied into another."""

    def joined(self, x):
        a = F.max_pool2d(x, 2)
        b = torch.cat([a, self.layers[0](a)], 1)
        c = torch.cat([b, self.layers[1](b)], 1)
        return torch.cat([c, self.layers[2](c)], 1) + c.mean()


class GrowingResidual(Growing):
    """A residual must be dense."""

    def joined(self, x):
        a = torch.cat([self.a(x), self.b(x)], 1)
        return torch.cat([a, self.layers[2](a) + a[:, :5], self.square(a) + a], 1)


# By model: how many operations write into a slice, how many slices are read, and how many concatenations stay.
GROWING = {
    Growing: (5, 4, 0),
    GrowingNested: (5, 4, 0),
    GrowingFromTheEnd: (5, 4, 0),
    GrowingBetween: (5, 4, 0),
    GrowingReadElsewhere: (3, 2, 1),
    GrowingResidual: (2, 1, 1),
}


class GrowingByCopies(nn.Module):
    """PyTorch computes all that is concatenated, so that nothing writes it in place."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stems = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=1) for _ in range(2))
        self.reduce = nn.ModuleList(nn.Conv2d(8 + 4 * layer, 6, 1) for layer in range(layers))
        self.grow = nn.ModuleList(nn.Conv2d(6, 4, 3, padding=1) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [stem(x).cos() for stem in self.stems]
        for reduce, grow in zip(self.reduce, self.grow):
            found.append(grow(reduce(torch.cat(found, 1))).cos())
        return F.max_pool2d(torch.cat(found, 1), 2)


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(batch))


@EACH
def test_what_can_be_is_written_in_place_and_the_graph_stays_sound(make):
    seen = capture(make().eval(), image(), conv2d="direct")["concat"]
    assert (count(seen, "_into"), count(seen, "copy_"), count(seen, "aten.cat")) == MODELS[make]


@pytest.mark.parametrize("make", GROWING, ids=lambda make: make.__name__)
def test_what_grows_is_one_image(make):
    seen = capture(make().eval(), image(), conv2d="gemm")["concat"]
    found = (count(seen, "_into"), count(seen, "aten.slice") - count(seen, "copy_"), count(seen, "aten.cat"))
    assert found == GROWING[make]


@pytest.mark.parametrize(("layers", "copies", "stay"), [(1, 0, 2), (4, 6, 0)])
def test_what_grows_is_copied_once_where_that_is_half_of_what_would_be_joined(layers, copies, stay):
    """12 channels of 8 + 12, and 24 of 8 + 12 + 16 + 20 + 24."""
    seen = capture(GrowingByCopies(layers).eval(), image(), conv2d="gemm")["concat"]
    assert (count(seen, "_into"), count(seen, "copy_"), count(seen, "aten.cat")) == (0, copies, stay)


@pytest.mark.parametrize("make", [Growing, GrowingNested])
def test_no_image_grows_for_an_algorithm_that_must_copy_it(make):
    assert count(capture(make().eval(), image(), conv2d="direct")["concat"], "aten.slice") == 0


@pytest.mark.parametrize("algorithm", ["direct", "smm"])
def test_a_concatenation_stays_without_fusion_or_with_an_algorithm_that_cannot(algorithm):
    seen = capture(Fire().eval(), image(), conv2d=algorithm, fuse=algorithm == "smm")["concat"]
    assert count(seen, "_into") == 0 and count(seen, "aten.cat") == 1


@EACH
@pytest.mark.parametrize("capture_by", ["eager", "convert"])
def test_models_equal_eager(make, capture_by):
    model, x = make().eval(), image()
    with torch.inference_mode():
        expected = make().eval().double()(x.double())
        if capture_by == "convert":
            found = ai3_compile.convert(model, {"conv2d": "direct"}, x.shape)(x)
        else:
            torch._dynamo.reset()
            found = compiled(model, rest="eager", conv2d="direct")(x)
            assert found.stride() == model(x).stride()
        assert references.relative_error(found, expected) < BOUND


class All(nn.Module):
    """Models in one graph: Inductor compiles it in the time of one."""

    def __init__(self, models: Iterable[type[Convs]]) -> None:
        super().__init__()
        self.models = nn.ModuleList(make() for make in models)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [model(x) for model in self.models]


@pytest.mark.parametrize(
    ("rest", "mode", "batches"),
    [
        ("eager", torch.no_grad, (3, 1, 2, 0)),
        ("eager", torch.inference_mode, (3, 1, 2, 0)),
        ("inductor", torch.inference_mode, (3, 2)),  # for none or one it compiles again, as Growing's test has it
    ],
)
def test_any_batch_in_one_graph(rest, mode, batches):
    """Every concatenation is in it, with sizes that only a call knows."""
    torch._dynamo.reset()
    model, reference = All(MODELS).eval(), All(MODELS).eval().double()
    f = compiled(model, rest=rest, conv2d="direct")
    with mode():
        for batch in batches:
            x = image(batch)
            if batch > 1:
                torch._dynamo.mark_dynamic(x, 0)
            for make, found, expected in zip(MODELS, f(x), reference(x.double())):
                assert found.shape == expected.shape
                assert references.relative_error(found, expected) < BOUND, make.__name__


@pytest.mark.parametrize("rest", RESTS)
def test_images_that_grow_with_any_batch(rest):
    torch._dynamo.reset()
    models = (Growing, GrowingBetween)
    model, reference = All(models).eval(), All(models).eval().double()
    f = compiled(model, rest=rest, conv2d="gemm")
    with torch.no_grad():
        for batch in (3, 1, 0):
            x = image(batch)
            if batch > 1:
                torch._dynamo.mark_dynamic(x, 0)
            for make, found, expected in zip(models, f(x), reference(x.double())):
                assert references.judge(found, expected, BOUND)[1] is None, make.__name__


@pytest.mark.parametrize("make", GROWING, ids=lambda make: make.__name__)
def test_images_that_grow_in_a_converted_model(make):
    converted = ai3_compile.convert(make().eval(), {"conv2d": "gemm"}, (2, 3, 12, 12))
    with torch.inference_mode():
        for batch in (2, 1):
            x = image(batch)
            assert references.judge(converted(x), make().eval().double()(x.double()), BOUND)[1] is None


@pytest.mark.parametrize("rest", RESTS)
def test_any_size_in_one_graph(rest):
    """Fire's height and width are its input's; Reduction's no node of the graph tells before they are computed."""
    torch._dynamo.reset()
    model = nn.ModuleList([Fire(), Reduction()]).eval()
    model.forward = lambda x: [part(x) for part in model]
    f = torch.compile(model, backend="ai3", options={"rest": rest, "conv2d": "direct"}, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 3, 12, 14), (3, 3, 15, 11)):
            x = torch.randn(shape)
            for found, part in zip(f(x), model):
                assert references.relative_error(found, part(x)) < BOUND
    concats = [row.fused.count("concat") for row in ai3_compile.last_report() if row.operation == "conv2d"]
    assert sum(concats) == 2


def test_the_report_says_what_is_written_in_place():
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(Reduction().eval(), rest="eager", conv2d="direct")(image())
    rows = {row.name or row.operation: row for row in ai3_compile.last_report()}
    assert {name for name, row in rows.items() if "concat" in row.fused} == {"fewer", "maxpool2d", "avgpool2d"}
    assert "direct@cpp + concat" in str(ai3_compile.last_report())


def test_nothing_is_written_in_place_where_gradients_are_wanted():
    torch._dynamo.reset()
    model, x = Fire().train(), image()
    out = compiled(model, rest="eager", conv2d="direct")(x)
    assert not any("concat" in row.fused for row in ai3_compile.last_report())
    (grad,) = torch.autograd.grad(out.sum(), model.a.weight)
    (expected,) = torch.autograd.grad(model(x).sum(), model.a.weight)
    assert references.relative_error(grad, expected) < BOUND


def test_a_converted_model_is_saved_and_loaded_with_it(tmp_path):
    model, x = ai3_compile.convert(Nested().eval(), {"conv2d": "direct"}, (2, 3, 12, 12)), image()
    expected = model(x)
    model.save(tmp_path / "model.ai3")
    loaded = ai3_compile.load(tmp_path / "model.ai3")
    assert torch.equal(loaded(x), expected)
    assert sum("concat" in row.fused for row in loaded.report) == 5


def test_a_concatenation_of_ai3s_operations_alone_is_all_ai3s():
    """strict=True refuses what PyTorch computes: nothing, where every value is written in place."""
    ai3_compile.convert(Fire().eval(), {"conv2d": "direct"}, (2, 3, 12, 12), strict=True)
    with pytest.raises(ai3_compile.errors.UnsupportedCallableError, match="sigmoid"):
        ai3_compile.convert(Mixed().eval(), {"conv2d": "direct"}, (2, 3, 12, 12), strict=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rest", RESTS)
def test_a_concatenation_that_is_an_output_keeps_its_layout(rest, memory_format):
    """The user gets the image itself, or a copy in the layout that eager has."""
    torch._dynamo.reset()
    model, x = Fire().eval(), image().to(memory_format=memory_format)
    convs = nn.ModuleList([model.a, model.b]).to(memory_format=memory_format)
    x = model.stem(x).detach()

    def joined(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([convs[0](x), convs[1](x)], 1)

    f = torch.compile(joined, backend="ai3", options={"rest": rest, "conv2d": "direct"})
    with torch.inference_mode():
        first, second, expected = f(x), f(x * 2), joined(x)
    assert references.relative_error(first, expected) < BOUND, "the second call has not written into it"
    assert references.relative_error(second, joined(x * 2)) < BOUND
    assert first.stride() == expected.stride()
    assert sum("concat" in row.fused for row in ai3_compile.last_report()) == 2
