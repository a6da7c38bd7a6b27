"""Attention on a GPU: its error against float64, refusals, a Swin, and an encoder of a transformer
(test_cuda_attention.py on the CPU: masks, layouts, NaN and infinities)."""

from __future__ import annotations

import copy

import pytest
import torch

import ai3_compile as ai3
from ai3_compile import core, registry, zoo
from ai3_compile.backends import gpu
from ai3_compile.ops.attention import _weights
from ai3_compile.testing.references import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TF32 = torch.float32
BOUNDS = {torch.float16: 6e-4, torch.bfloat16: 5e-3, TF32: 6e-4}
SHAPES = [
    ((), 1, 1, 1, 1),
    ((1, 1), 3, 5, 7, 9),
    ((640, 4), 49, 49, 32, 32),
    ((3,), 64, 64, 64, 64),
    ((1, 2, 1, 2, 1, 1), 17, 33, 48, 20),
]
LONG = [((2,), 65, 65, 64, 64), ((10, 12), 197, 197, 64, 64), ((2, 3), 1000, 130, 33, 50)]
CASES = [*((dtype, shape) for dtype in BOUNDS for shape in SHAPES), *((TF32, shape) for shape in LONG)]


@pytest.fixture(autouse=True)
def nothing_stays():
    torch.manual_seed(0)
    with gpu.precision(tf32=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_it_is_right(shape, causal, dtype):
    core.load()
    core.follow_numerics()
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
        assert relative_error(found.cpu(), right.cpu()) < BOUNDS[dtype]


OPTIONS = pytest.mark.parametrize("options", [{"rest": "eager"}, {"mode": "reduce-overhead"}], ids=str)


@OPTIONS
@pytest.mark.parametrize("dtype", [torch.float16, TF32], ids=str)
def test_a_swin(options, dtype):
    model = zoo.load_model("torchvision:swin_t").cuda().to(dtype)
    agrees(model, torch.randn(2, *zoo.default_shape("swin_t")[1:], device="cuda", dtype=dtype), 2, options)


@OPTIONS
def test_an_encoder(options):
    """PyTorch's own attention of float32 splits what it rounds, and errs less than its products beside it."""
    layer = torch.nn.TransformerEncoderLayer(192, 3, 384, dropout=0.0, batch_first=True)
    model = torch.nn.Sequential(*(copy.deepcopy(layer) for _ in range(2))).cuda().eval()
    agrees(model, torch.randn(4, 197, 192, device="cuda"), 4, options)


def agrees(model: torch.nn.Module, x: torch.Tensor, times: float, options: dict[str, object]) -> None:
    """Within so many times the error of eager PyTorch, with every attention ai3's."""
    with torch.no_grad():
        run = torch.compile(model, backend="ai3", options={"attention": "direct", **options})
        for _ in range(3):
            found = run(x)
        right, eager = copy.deepcopy(model).double()(x.double()), model(x)
    assert relative_error(found.cpu(), right.cpu()) < times * relative_error(eager.cpu(), right.cpu())
    chosen = {row.algorithm for row in ai3.last_report() if row.operation == "attention"}
    assert chosen == {"direct@cuda"}


def test_strict_float32_is_left_to_pytorch():
    q = torch.randn(1, 2, 50, 32, device="cuda")
    with torch.no_grad(), gpu.precision(tf32=False):
        torch.compile(torch.nn.functional.scaled_dot_product_attention, backend="ai3")(q, q, q)
    (row,) = [row for row in ai3.last_report() if row.operation == "attention"]
    assert row.algorithm == "torch" and "TF32" in str(row.rejected)


def test_more_keys_than_it_takes():
    q = torch.randn(1, 2, 197, 64, device="cuda").half()
    attend = torch.compile(
        torch.nn.functional.scaled_dot_product_attention, backend="ai3", options={"attention": "direct"}
    )
    with torch.no_grad(), pytest.raises(Exception, match="direct@cuda: has more than 64 queries or keys of halves"):
        attend(q, q, q)
