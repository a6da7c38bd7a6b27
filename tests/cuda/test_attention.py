"""Attention of few queries and keys on a GPU: its error against float64, refusals, and a Swin (test_cuda_attention.py
on the CPU: masks, layouts, NaN and infinities)."""

from __future__ import annotations

import copy

import pytest
import torch

import ai3_compile as ai3
from ai3_compile import core, registry, zoo
from ai3_compile.ops.attention import _weights
from ai3_compile.testing.references import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HALVES = {torch.float16: 6e-4, torch.bfloat16: 5e-3}
SHAPES = [
    ((), 1, 1, 1, 1),
    ((1, 1), 3, 5, 7, 9),
    ((640, 4), 49, 49, 32, 32),
    ((3,), 64, 64, 64, 64),
    ((1, 2, 1, 2, 1, 1), 17, 33, 48, 20),
]


@pytest.fixture(autouse=True)
def nothing_stays():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_right(shape, causal, dtype):
    core.load()
    registry.prepare([("attention", "cuda")])
    number = registry.find("attention", "direct@cuda").id
    leading, rows, keys, depth, width = shape
    q, k, v, bias, mask = (
        torch.randn(size, device="cuda").to(dtype)
        for size in (
            (*leading, rows, depth),
            (*leading, keys, depth),
            (*leading, keys, width),
            (rows, keys),
            (*leading[:1], *[1] * len(leading[1:]), rows, keys),
        )
    )
    for terms in ((None, None), (bias, None), (bias, mask)):
        found = torch.ops.ai3.attention(q, k, v, *terms, 0.3, causal, True, number)
        terms = [None if t is None else t.double() for t in terms]
        right = _weights(q.double(), k.double(), *terms, 0.3, causal, True) @ v.double()
        assert relative_error(found.cpu(), right.cpu()) < HALVES[dtype]


@pytest.mark.parametrize("options", [{"rest": "eager"}, {"mode": "reduce-overhead"}], ids=str)
def test_a_swin(options):
    model = zoo.load_model("torchvision:swin_t").cuda().half()
    x = torch.randn(2, *zoo.default_shape("swin_t")[1:], device="cuda").half()
    with torch.no_grad():
        run = torch.compile(model, backend="ai3", options={"attention": "direct", **options})
        for _ in range(3):
            found = run(x)
        right, eager = copy.deepcopy(model).double()(x.double()), model(x)
    # Rounded as often as eager's, elsewhere.
    assert relative_error(found.cpu(), right.cpu()) < 2 * relative_error(eager.cpu(), right.cpu())
    chosen = {row.algorithm for row in ai3.last_report() if row.operation == "attention"}
    assert chosen == {"direct@cuda"}


def test_more_keys_than_it_takes():
    q = torch.randn(1, 2, 197, 64, device="cuda").half()
    attend = torch.compile(
        torch.nn.functional.scaled_dot_product_attention, backend="ai3", options={"attention": "direct"}
    )
    with torch.no_grad(), pytest.raises(Exception, match="direct@cuda: has more than 64 queries or keys"):
        attend(q, q, q)
