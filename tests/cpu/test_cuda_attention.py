"""Attention's CUDA kernel on the CPU (tests/emulation), against float64: shapes, masks, layouts, and what it refuses.

Bounds as of the products in test_cuda_emulated.py: weights and results are each rounded to the type once. In TF32 all
factors are rounded to 2^-12, as halves are.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F

from ai3_compile import registry
from ai3_compile.backends import abi
from ai3_compile.ops.attention import _weights
from ai3_compile.testing import harness, references
from tests import emulation

pytestmark = pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable()))

ALGORITHM = registry.find("attention", "direct@cuda")
TF32 = torch.float32
BOUNDS = {torch.float16: 6e-4, torch.bfloat16: 5e-3, TF32: 6e-4}
# Leading sizes, queries, keys, features of a key and of a value; a warp has 16 queries, a block of them and one of keys
# 64, which are the most of halves and of features.
SHAPES = {
    "one": ((), 1, 1, 1, 1),
    "odd": ((1, 1), 3, 5, 7, 9),
    "divides": ((2, 3), 16, 32, 32, 32),
    "window": ((2, 3), 49, 49, 32, 32),
    "equal": ((3,), 64, 64, 64, 64),
    "below": ((2, 1, 2), 17, 33, 48, 20),
    "six": ((1, 2, 1, 2, 1, 1), 5, 20, 16, 8),
}
LONG = {
    "blocks-above": ((2,), 65, 65, 64, 64),
    "blocks-divide": ((), 128, 192, 32, 64),
    "half-a-block": ((2,), 20, 96, 40, 36),
    "more-keys": ((2, 1), 3, 201, 17, 5),
    "more-queries": ((1, 2), 150, 30, 64, 33),
    "vit": ((2,), 197, 197, 64, 64),
}
CASES = [
    *((dtype, name, shape) for dtype in BOUNDS for name, shape in SHAPES.items()),
    *((TF32, name, shape) for name, shape in LONG.items()),
]


@pytest.fixture(scope="module")
def table():
    return emulation.load([ALGORITHM])[ALGORITHM]


def data(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def operands(shape, dtype: torch.dtype) -> list[torch.Tensor]:
    leading, rows, keys, depth, width = shape
    sizes = (rows, depth), (keys, depth), (keys, width)
    return [data(*leading, *size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]


def view(t: torch.Tensor, like: torch.Size | None = None) -> abi.Tensor:
    t = t if like is None else t.expand(like)
    made = abi.Tensor(data=t.data_ptr(), ndim=t.dim())
    for d in range(t.dim()):
        made.size[d], made.stride[d] = t.shape[d], t.stride(d)
    return made


def arguments(q, k, v, bias=None, mask=None, scale=0.3, causal=False, zero=True, at=0):
    """The arguments of a call, its result, `at` elements behind the first of a buffer between guards, and what it says
    if it fails."""
    args = abi.Args(dtype={torch.float16: abi.FLOAT16, torch.bfloat16: abi.BFLOAT16}.get(q.dtype, abi.FLOAT32))
    shape = torch.Size((*q.shape[:-1], v.shape[-1]))
    buffer = harness.Guarded("output", (at + shape.numel()) * q.element_size())
    out = buffer.view(q.dtype)[at:].view(shape)
    scores = torch.Size((*q.shape[:-1], k.shape[-2]))
    args.input, args.key, args.value, args.output = view(q), view(k), view(v), view(out)
    for name, term in (("score_bias", bias), ("score_mask", mask)):
        if term is not None:
            setattr(args, name, view(term, scores))
    args.scale, args.is_causal, args.masked_is_zero = scale, causal, zero
    failures: list[str] = []
    runtime = harness.runtime(failures, 1)
    args.runtime = ctypes.pointer(runtime)
    return args, out, buffer, failures, runtime


def attend(table, *tensors, **how) -> torch.Tensor:
    args, out, buffer, failures, _ = arguments(*tensors, **how)
    table.allow_tf32 = out.dtype == TF32
    assert table.supports(args) is None
    table.run(args)
    assert not failures, failures
    buffer.check()
    return out


def expected(q, k, v, bias=None, mask=None, scale=0.3, causal=False, zero=True) -> torch.Tensor:
    q, k, v, bias, mask = (None if t is None else t.double() for t in (q, k, v, bias, mask))
    return _weights(q, k, bias, mask, scale, causal, zero) @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "name", "shape"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_it_is_right(table, shape, causal, dtype, name):
    q, k, v = operands(shape, dtype)
    leading, rows, keys = shape[:3]
    bias = data(rows, keys, dtype=dtype)
    mask = data(*leading[:1], *[1] * len(leading[1:]), rows, keys, dtype=dtype)
    for order, terms in enumerate(((None, None), (bias, None), (bias, mask))):
        table.set_order(emulation.ORDERS[order], False)
        found = attend(table, q, k, v, *terms, causal=causal)
        right = expected(q, k, v, *terms, causal=causal)
        assert references.relative_error(found, right) < BOUNDS[dtype]


@pytest.mark.parametrize(("keys", "dtype"), [(5, torch.float16), (49, torch.float16), (49, TF32), (150, TF32)])
def test_masked_rows_and_columns(table, keys, dtype):
    """What a query sees first may be in any of the blocks of keys."""
    q, k, v = operands(((2,), 40, keys, 8, 8), dtype)
    mask = data(40, keys, dtype=dtype)
    mask = mask.masked_fill(data(40, keys, dtype=dtype, seed=1) > 0, -math.inf)
    mask[3] = -math.inf
    mask[4, : keys - 1], mask[4, keys - 1] = -math.inf, 0
    for zero, kept in ((True, 0.0), (False, math.nan)):
        found, right = (f(q, k, v, None, mask, zero=zero) for f in (lambda *a, **b: attend(table, *a, **b), expected))
        torch.testing.assert_close(found.double(), right, rtol=2e-3, atol=2e-3, equal_nan=True)
        torch.testing.assert_close(found[:, 3], torch.full((2, 8), kept).to(dtype), equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize(("keys", "dtype", "at"), [(40, torch.float16, 7), (150, TF32, 7), (150, TF32, 70)])
def test_nan_and_infinity_go_where_pytorchs_go(table, keys, dtype, at, which, value):
    tensors = operands(((2,), 80 if dtype == TF32 else 20, keys, 16, 16), dtype)
    tensors[which][1, at, 3] = value
    found, right = attend(table, *tensors, zero=False), expected(*tensors, zero=False)
    torch.testing.assert_close(found.double(), right, rtol=2e-3, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("order", ["falling", "rising"])
@pytest.mark.parametrize(("keys", "dtype"), [(40, torch.float16), (200, TF32)])
def test_large_scores_do_not_overflow(table, keys, dtype, order):
    """Products of small whole numbers have no error; by their order a later block has the larger scores or not."""
    q = torch.ones(2, 33, 16, dtype=dtype)
    k = torch.arange(keys).remainder(8).add(torch.arange(keys) // 64 * 8).to(dtype).view(1, -1, 1).repeat(2, 1, 16)
    k, v = (k if order == "rising" else k.flip(1)), data(2, keys, 16, dtype=dtype)
    found, right = attend(table, q, k, v, scale=10.0), expected(q, k, v, scale=10.0)
    assert references.relative_error(found, right) < BOUNDS[dtype] and found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, TF32], ids=str)
def test_any_layout_and_nothing_beside_it_is_read(table, dtype):
    """The emulation sees what is read; NaN lies around."""
    q, k, v = operands(((2, 3), 21, 22, 24, 16), dtype)
    right, mask = expected(q, k, v), data(21, 22, dtype=dtype)

    def between_nan(t: torch.Tensor, pad: int) -> torch.Tensor:
        wide = F.pad(t, (pad,) * 2 * t.dim(), value=math.nan)
        return wide[tuple(slice(pad, -pad) for _ in t.shape)]

    for layout in (
        lambda t: between_nan(t, 3),
        lambda t: between_nan(t, 8),
        lambda t: between_nan(t.transpose(1, 2), 1).transpose(1, 2),
        lambda t: torch.repeat_interleave(t, 2, -2)[..., ::2, :],
    ):
        given = [layout(t) for t in (q, k, v)]
        assert references.relative_error(attend(table, *given), right) < BOUNDS[dtype]
        found = attend(table, *given, layout(mask[None, None])[0, 0])
        assert references.relative_error(found, expected(q, k, v, mask)) < BOUNDS[dtype]
        for only in range(3):
            given = [layout(t) if i == only else t for i, t in enumerate((q, k, v))]
            assert references.relative_error(attend(table, *given, at=only), right) < BOUNDS[dtype]
    one = [t[:, :1].expand(t.shape) for t in (q, k, v)]
    assert references.relative_error(attend(table, *one), expected(*one)) < BOUNDS[dtype]
    for features in ((18, 16), (16, 18)):  # no whole parts, in rows that are
        given = operands(((2,), 21, 22, *features), dtype)
        right = expected(*given)
        given = [F.pad(t, (0, 32 - t.shape[-1]), value=math.nan)[..., : t.shape[-1]] for t in given]
        assert references.relative_error(attend(table, *given), right) < BOUNDS[dtype]


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        (((2,), 8, 8, 8, 8), TF32, "needs float16, bfloat16, or float32 whose products may be rounded to TF32"),
        (((2,), 8, 0, 8, 8), torch.float16, "needs at least one key of one feature"),
        (((2,), 8, 8, 0, 8), torch.float16, "needs at least one key of one feature"),
        (((2,), 65, 8, 8, 8), torch.float16, "has more than 64 queries or keys of halves"),
        (((2,), 8, 65, 8, 8), torch.float16, "has more than 64 queries or keys of halves"),
        (((2,), 8, 8, 65, 8), torch.float16, "has more than 64 features"),
        (((2,), 8, 8, 8, 65), torch.float16, "has more than 64 features"),
    ],
)
def test_what_it_refuses(table, shape, dtype, why):
    table.allow_tf32 = False
    assert table.supports(arguments(*operands(shape, dtype))[0]) == why
    table.allow_tf32 = True
    wide = operands((shape[0], 8, 8, 65, 8), TF32)
    assert table.supports(arguments(*wide)[0]) == "has more than 64 features"
