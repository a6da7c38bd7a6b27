"""Attention: its error against float64, its masks and layouts, and where graphs have it."""

from __future__ import annotations

import math
import operator
import struct

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ai3_compile
from ai3_compile import core, errors
from ai3_compile.ops import attention_graph
from ai3_compile.ops.attention import _weights
from ai3_compile.testing import check_algorithm, compare, references

from .test_backend import RESTS, compiled
from .test_ops import identity

core.load()
DIRECT = identity("attention")
# A product of some hundred terms and a softmax err by less than 1e-6 in float32 and 1e-14 in float64 here.
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-13}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
# Leading sizes, queries, keys, features of a key and of a value: within, at and beyond a vector, a panel and a block
# of keys; one head and more than there are threads.
SHAPES = [
    ((), 1, 1, 1, 1),
    ((1, 1), 3, 5, 7, 9),
    ((2, 3), 16, 16, 32, 32),
    ((5, 4), 49, 49, 32, 32),
    ((1, 12), 197, 197, 64, 64),
    ((3,), 70, 513, 17, 33),
    ((2,), 5, 1100, 8, 16),
    ((2, 1, 3), 130, 31, 65, 3),
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def attend(q, k, v, bias=None, mask=None, scale=0.3, causal=False, zero=True) -> torch.Tensor:
    return torch.ops.ai3.attention(q, k, v, bias, mask, scale, causal, zero, DIRECT)


def expected(q, k, v, bias=None, mask=None, scale=0.3, causal=False, zero=True) -> torch.Tensor:
    """In float64, as the definition says."""
    q, k, v, bias, mask = (None if t is None else t.double() for t in (q, k, v, bias, mask))
    return _weights(q, k, bias, mask, scale, causal, zero) @ v


def operands(shape, dtype=torch.float32) -> list[torch.Tensor]:
    leading, rows, keys, depth, width = shape
    sizes = (rows, depth), (keys, depth), (keys, width)
    return [data(*leading, *size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_right(shape, causal, dtype):
    q, k, v = operands(shape, dtype)
    leading, rows, keys = shape[:3]
    bias, mask = data(rows, keys, dtype=dtype), data(*leading[:1], *[1] * len(leading[1:]), rows, keys, dtype=dtype)
    for terms in ((None, None), (bias, None), (bias, mask)):
        found = attend(q, k, v, *terms, causal=causal)
        assert references.relative_error(found, expected(q, k, v, *terms, causal=causal)) < BOUNDS[dtype]
        assert found.dim() < 3 or found.transpose(-3, -2).is_contiguous()


def test_it_errs_no_more_than_pytorch():
    """At most 5 times: its sums have another order."""
    q, k, v = operands(((1, 12), 197, 197, 64, 64))
    right = expected(q, k, v, scale=0.125)
    eager = references.relative_error(F.scaled_dot_product_attention(q, k, v), right)
    assert references.relative_error(attend(q, k, v, scale=0.125), right) < 5 * eager


@pytest.mark.parametrize("keys", [5, 49, 700])
def test_masked_rows_and_columns(keys):
    q, k, v = operands(((2, 3), 40, keys, 8, 8))
    mask = data(40, keys).masked_fill(data(40, keys, seed=1) > 0, -math.inf)
    mask[3] = -math.inf
    mask[4, : keys - 1], mask[4, keys - 1] = -math.inf, 0
    for zero, kept in ((True, 0.0), (False, math.nan)):
        found, right = attend(q, k, v, None, mask, zero=zero), expected(q, k, v, None, mask, zero=zero)
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(found[:, :, 3], torch.full((2, 3, 8), kept), equal_nan=True)


def test_rows_that_see_no_key_are_what_pytorchs_function_gives():
    q, k, v = operands(((2, 3), 6, 7, 8, 8))
    mask = data(6, 7)
    mask[2] = -math.inf
    found, right = attend(q, k, v, None, mask, scale=0.5), F.scaled_dot_product_attention(q, k, v, mask, scale=0.5)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_nan_and_infinity_go_where_pytorchs_go(which, value):
    tensors = operands(((2, 2), 20, 600, 16, 16))
    tensors[which][1, 0, 7, 3] = value
    found, right = attend(*tensors, zero=False), expected(*tensors, zero=False)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_large_scores_do_not_overflow():
    q, k, v = operands(((2,), 33, 530, 16, 16))
    found, right = attend(q, k, v, scale=1e3), expected(q, k, v, scale=1e3)
    # Scores of some 1e4 are rounded to 1e-3, which is the relative error of a weight.
    assert references.relative_error(found, right) < 1e-2 and found.isfinite().all()


def test_any_layout_and_nothing_beside_it_is_read():
    """Heads beside each other in memory, transposed features, expanded heads; NaN lies around all of them."""
    q, k, v = operands(((2, 3), 21, 22, 9, 10))
    right = expected(q, k, v)

    def between_nan(t: torch.Tensor, pad: int = 3) -> torch.Tensor:
        wide = F.pad(t, (pad,) * 2 * t.dim(), value=math.nan)
        return wide[tuple(slice(pad, -pad) for _ in t.shape)]

    for layout in (
        between_nan,
        lambda t: between_nan(t.transpose(1, 2)).transpose(1, 2),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.repeat_interleave(t, 2, -2)[..., ::2, :],
    ):
        given = [layout(t) for t in (q, k, v)]
        assert references.relative_error(attend(*given), right) < 1e-6
        mask = data(21, 22)
        assert references.relative_error(attend(*given, layout(mask[None, None])), expected(q, k, v, mask)) < 1e-6
    one = [t[:, :1].expand(t.shape) for t in (q, k, v)]
    assert references.relative_error(attend(*one), expected(*one)) < 1e-6


@DTYPES
def test_empty_batches_heads_and_queries(dtype):
    for shape in (((0, 3), 4, 5, 6, 7), ((2, 0), 4, 5, 6, 7), ((2, 3), 0, 5, 6, 7), ((2, 3), 4, 5, 6, 0)):
        q, k, v = operands(shape, dtype)
        assert attend(q, k, v).shape == (*shape[0], shape[1], shape[4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": data(2, 3, 6, 8)}, "do not fit keys of 8"),
        ({"v": data(2, 3, 5, 7)}, "6 keys do not fit 5 values"),
        ({"k": data(1, 3, 6, 7)}, "differ in dimension 0"),
        ({"k": data(3, 6, 7)}, "of the same number of dimensions"),
        ({"mask": data(5, 1)}, "has not their 6 columns"),
        ({"mask": data(4, 6)}, "4 elements in dimension 2"),
        ({"mask": data(5, 6).double()}, "different dtypes"),
        ({"q": data(2, 3, 5, 0), "k": data(2, 3, 6, 0)}, "needs at least one key"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"q": data(2, 3, 5, 7), "k": data(2, 3, 6, 7), "v": data(2, 3, 6, 4)} | change
    with pytest.raises(RuntimeError, match=message):
        attend(**given)


@pytest.mark.parametrize("number", range(2), ids=["bias", "mask"])
def test_a_sequence_takes_one_term_or_the_other(number):
    q, k, v = operands(((2, 3), 6, 7, 8, 9))
    term = data(6, 7)
    terms = [term if i == number else None for i in range(2)]
    words = ["o3" if i == number else "n" for i in range(2)]
    scale = struct.unpack("=Q", struct.pack("=d", 0.3))[0]
    program = f"attention 4 t0 t1 t2 {' '.join(words)} d{scale} b0 b1 i{DIRECT};return 4"
    (found,) = torch.ops.ai3.sequence(program, [q, k, v, term])
    assert torch.equal(found, attend(q, k, v, *terms))


class Fused(nn.Module):
    """As in a vision transformer: heads taken from one linear; `options` are those of PyTorch's function."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.qkv, self.proj, self.options = nn.Linear(24, 72), nn.Linear(24, 24), options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2))


class Windows(nn.Module):
    """As torchvision's shifted_window_attention writes it out, in batches of windows of an image, four each."""

    def __init__(self, shifted: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.register_buffer("bias", data(1, 3, 9, 9))
        self.register_buffer("mask", torch.where(data(4, 9, 9) > 0, 0.0, -100.0) if shifted else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).reshape(x.size(0), x.size(1), 3, 3, 8).permute(2, 0, 3, 1, 4)
        scores = (qkv[0] * 8**-0.5).matmul(qkv[1].transpose(-2, -1)) + self.bias
        if self.mask is not None:
            scores = scores.view(x.size(0) // 4, 4, 3, 9, 9) + self.mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, 3, 9, 9)
        attended = F.softmax(scores, dim=-1).matmul(qkv[2]).transpose(1, 2)
        return self.proj(attended.reshape(x.size(0), x.size(1), 24))


NETWORKS = {
    "plain": lambda: Fused(),
    "scaled": lambda: Fused(scale=0.5),
    "causal": lambda: Fused(is_causal=True),
    "masked": lambda: Fused(attn_mask=data(9, 9)),
    "boolean mask": lambda: Fused(attn_mask=data(9, 9) > 0),
    "windows": lambda: Windows(False),
    "shifted windows": lambda: Windows(True),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def attentions() -> list[str]:
    return [row.algorithm for row in ai3_compile.last_report() if row.operation == "attention"]


def check_alone(profile: torch.profiler.profile) -> None:
    """ai3's attention ran, and none of PyTorch's beside it."""
    ran = {event.key for event in profile.key_averages()}
    assert "ai3::attention[direct@cpp]" in ran
    assert not any("scaled_dot_product" in key or key in ("aten::bmm", "aten::_softmax") for key in ran), ran


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_torch_compile_finds_it(name, rest):
    model, x = network(name), data(8, 9, 24)
    with torch.no_grad():
        call = compiled(model, rest=rest, attention="direct")
        call(x)
        with torch.profiler.profile() as profile:
            found = call(x)
        assert attentions() == ["direct@cpp"]
        check_alone(profile)
        assert references.relative_error(found, model.double()(x.double())) < 2e-6


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("name", ["windows", "shifted windows"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_is_found_in_halves(dtype, name, rest):
    """Whose softmax Inductor takes apart in float32. No algorithm of the CPU computes them."""
    model, x = network(name).to(dtype), data(8, 9, 24).to(dtype)
    with torch.no_grad():
        compiled(model, rest=rest)(x)
    (row,) = (row for row in ai3_compile.last_report() if row.operation == "attention")
    assert row.algorithm == "torch" and row.rejected["direct@cpp"] == "needs float32 or float64"


@pytest.mark.parametrize("name", NETWORKS)
def test_convert_finds_it(name):
    model, x = network(name), data(8, 9, 24)
    with torch.no_grad():
        converted = ai3_compile.convert(model, {"attention": "direct"}, (8, 9, 24))
        with torch.profiler.profile() as profile:
            found = converted(x)
        assert attentions() == ["direct@cpp"]
        check_alone(profile)
        assert references.relative_error(found, model.double()(x.double())) < 2e-6


@pytest.mark.parametrize("name", ["plain", "windows", "shifted windows"])
def test_any_batch(name):
    """Batches not known when the graph is made; windows of shifted images would need sizes computed from them."""
    model = network(name)
    call = torch.compile(model, backend="ai3", dynamic=True, options={"rest": "eager"})
    exact = network(name).double()
    with torch.no_grad():
        for batch in (8, 4, 12):
            x = data(batch, 9, 24)
            assert references.relative_error(call(x), exact(x.double())) < 2e-6
    assert name == "shifted windows" or attentions() == ["direct@cpp"]


@pytest.mark.parametrize(
    ("name", "rest", "found"),
    [
        ("flash", {}, True),
        ("flash", {"is_causal": True, "scale": 0.25}, True),
        ("flash", {"dropout_p": 0.1}, False),
        ("flash", {"return_debug_mask": True}, False),
        ("efficient", {"attn_bias": None, "compute_log_sumexp": False}, True),
        ("efficient", {"attn_bias": data(9, 9), "compute_log_sumexp": False}, False),
        ("cudnn", {"attn_bias": None, "compute_log_sumexp": False, "is_causal": True}, True),
    ],
)
def test_what_pytorch_computes_it_by_on_a_gpu_is_found(name, rest, found):
    """In a graph made by hand, as these operations need a GPU."""
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(letter) for letter in "qkv"]
    for node in inputs:
        node.meta["val"] = torch.empty(2, 3, 9, 8, dtype=torch.float16, device="meta")
    if isinstance(bias := rest.get("attn_bias"), torch.Tensor):
        rest = {**rest, "attn_bias": graph.placeholder("bias")}
        rest["attn_bias"].meta["val"] = bias.half().to("meta")
    target = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default
    attended = graph.call_function(target, tuple(inputs), rest)
    result = graph.call_function(operator.getitem, (attended, 0))
    result.meta["val"] = torch.empty(2, 3, 9, 8, dtype=torch.float16, device="meta")
    graph.output(result)
    attention = attention_graph.find(result)
    assert (attention is not None) == found
    if attention is not None:
        assert attention.is_causal == rest.get("is_causal", False)
        assert attention.scale == rest.get("scale", 1 / math.sqrt(8)) and attention.masked_is_zero
        assert [operand.node for operand in (attention.query, attention.key, attention.value)] == inputs


class Shown(nn.Module):
    """It gives its weights back as well, which an operation that keeps them in cache cannot."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (x @ x.mT).softmax(-1)
        return weights @ x, weights


class OtherSoftmax(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x.mT).softmax(-2) @ x


@pytest.mark.parametrize("model", [Shown(), OtherSoftmax()], ids=["shown", "dim"])
def test_what_is_no_such_attention_stays_as_it_is(model):
    x = data(8, 9, 24)
    with torch.no_grad():
        found = compiled(model, rest="eager")(x)
        assert attentions() == []
        torch.testing.assert_close(found, model(x))


def test_torch_leaves_it_alone():
    model, x = network("windows"), data(8, 9, 24)
    with torch.no_grad():
        compiled(model, rest="eager", attention="torch")(x)
    assert attentions() == ["torch"]


def test_nothing_to_swap_and_no_cases():
    with pytest.raises(errors.UnsupportedCallableError, match="attention is no module of torch.nn"):
        ai3_compile.swap_operation("attention", nn.Linear(2, 2), "direct")
    with pytest.raises(errors.UnsupportedCallableError, match="has cases of it"):
        check_algorithm("attention", "direct")
    with pytest.raises(errors.UnsupportedCallableError, match="has cases of it"):
        compare("attention", [])
