"""Networks whose poolings of 2x2 pixels become part of the convolutions before them (test_tiles.py: their kernels)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ai3_compile as ai3
from ai3_compile import core, registry
from ai3_compile.backends import gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

IMPLICIT_GEMM = "implicit gemm@cuda"


@pytest.fixture(autouse=True)
def strict():
    torch.manual_seed(0)
    with gpu.precision(tf32=False):
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(64, channels, 3, padding=1), nn.Conv2d(channels, 64, 3, padding=1)
        self.norm, self.pool = nn.BatchNorm2d(64), nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.norm(self.second(self.pool(self.first(x).relu()))))


def error(found: torch.Tensor, model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
    return float((found - expected).abs().max() / expected.abs().max())


def pooled() -> list[bool]:
    return ["maxpool2d" in row.fused for row in ai3.last_report() if row.operation == "conv2d"]


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{"rest": "eager"}, {"mode": "reduce-overhead"}], ids=str)
def test_a_network(dtype, options):
    """Limits as of two convolutions in test_backend.py; of TF32, sums of 576 products of 11 bits.

    Of six images, as of small ones a pooling apart may be estimated to be as fast.
    """
    limit = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 5e-3}[dtype]
    model, x = Net().cuda().eval().to(dtype), torch.randn(6, 64, 129, 64, device="cuda", dtype=dtype)
    with torch.no_grad(), gpu.precision(tf32=True):
        run = torch.compile(model, backend="ai3", options={"conv2d": IMPLICIT_GEMM, **options})
        for _ in range(3):
            found = run(x)
        assert error(found, model, x) < limit
        assert pooled() == [True, True]
        model.second.weight.mul_(-1)
        assert error(run(x), model, x) < limit, "weights that have changed"


def test_a_setting_that_changes_afterwards():
    """No tile of strict float32 pools: the operation calls two algorithms then."""
    model, x = Net().cuda().eval(), torch.randn(2, 64, 128, 64, device="cuda")
    with torch.no_grad():
        with gpu.precision(tf32=True):
            run = torch.compile(model, backend="ai3", options={"conv2d": IMPLICIT_GEMM, "rest": "eager"})
            rough = error(run(x), model, x)
        assert rough > 5e-5 > 5e-6 > error(run(x), model, x)


def test_the_layers_that_auto_measures():
    """With the pooling behind each; whatever is fastest, the numbers are right."""
    model, x = Net().cuda().eval().half(), torch.randn(2, 64, 64, 64, device="cuda").half()
    with torch.no_grad():
        assert error(torch.compile(model, backend="ai3", options={"conv2d": "auto"})(x), model, x) < 5e-3


@pytest.mark.parametrize("shape", [(0, 64, 16, 16), (1, 64, 2, 3), (3, 64, 17, 31), (2, 60, 16, 16)], ids=str)
@pytest.mark.parametrize("algorithm", [IMPLICIT_GEMM, "direct@cuda", "auto@cudnn"])
def test_the_operation(shape, algorithm):
    core.load()
    x = torch.randn(shape, device="cuda", dtype=torch.float16)
    w, b = torch.randn(72, shape[1], 3, 3, device="cuda").half() / 24, torch.randn(72, device="cuda").half()
    ids = registry.find("conv2d", algorithm).id, registry.find("maxpool2d", "direct@cuda").id
    registry.prepare([("conv2d", "cuda"), ("maxpool2d", "cuda")])
    found = torch.ops.ai3.conv2d_pooled(x, w, b, *(1,) * 9, *ids, activation=1)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.shape == (shape[0], 72, shape[2] // 2, shape[3] // 2)
    if shape[0]:
        expected = F.max_pool2d(F.conv2d(x.double(), w.double(), b.double(), padding=1).relu(), 2)
        assert float((found - expected).abs().max() / expected.abs().max()) < 2e-3
