"""Convolutions that take in a pooling of 2x2 pixels: the operation, the pass, and what it leaves alone.

None of ai3's algorithms of the CPU pools itself: the operation calls two, and the pass is told that it gains. One of a
user's does.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ai3_compile
from ai3_compile import core, registry, tuning
from ai3_compile.backends.native import NativePlatform
from ai3_compile.errors import AlgorithmCheckError, KernelLoadError
from ai3_compile.ops import OPERATIONS
from ai3_compile.ops.activations import NUMBERS
from ai3_compile.selection import Use
from ai3_compile.testing import check_algorithm, references

from .test_backend import RESTS, compiled
from .test_ops import identity

core.load()
ops = torch.ops.ai3
WINDOW = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
# A float32 sum of some dozens of products errs by 1e-6 at most.
BOUND = 1e-6


@pytest.fixture(autouse=True)
def nothing_stays():
    torch._dynamo.reset()


def arguments(size: tuple[int, int], batch: int = 2, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    x, w, b = torch.randn(batch, 4, *size, dtype=dtype), torch.randn(6, 4, 3, 3, dtype=dtype), torch.randn(6).to(dtype)
    return x, w, b, *(1,) * 9, identity("conv2d", "direct"), identity("maxpool2d")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("size", [(2, 2), (8, 6), (7, 9)], ids=["equal", "divides", "above"])
def test_gives_the_largest_of_each_four(size, batch, dtype):
    args = arguments(size, batch, dtype)
    found = ops.conv2d_pooled(*args, activation=1)
    x, w, b = (t.double() for t in args[:3])
    expected = F.max_pool2d(F.conv2d(x, w, b, padding=1).relu(), 2) if batch else x.new_empty(0, 6, 1, 1)
    assert found.is_contiguous(memory_format=torch.channels_last)
    if batch:
        assert references.relative_error(found, expected) < BOUND


def test_opcheck():
    torch.library.opcheck(ops.conv2d_pooled.default, arguments((8, 6)), {"activation": 1})


def test_an_unbatched_image():
    x, *rest = arguments((8, 6), 1)
    assert torch.equal(ops.conv2d_pooled(x[0], *rest), ops.conv2d_pooled(x, *rest)[0])


def test_too_small_an_image():
    with pytest.raises(RuntimeError, match="no 2x2 pixels in 1x6"):
        ops.conv2d_pooled(*arguments((1, 6)))


class Net(nn.Module):
    def __init__(self, pool: nn.Module, norm: bool = False) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3, padding=1), pool
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.next = nn.Conv2d(8, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.next(self.pool(self.norm(self.conv(x)).relu()))


class Twice(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).relu()
        return self.next(self.pool(y)) + y.mean()


class Added(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.next(self.pool((self.conv(x) + x.mean(1, keepdim=True)).relu()))


@pytest.fixture
def gains(monkeypatch):
    """As where every convolution pools in less time; the names of the activations that it was asked for."""
    asked = []
    monkeypatch.setattr(NativePlatform, "pools", lambda *a: asked.append(a[-1]) or True)
    return asked


def checked(model: nn.Module, **options) -> ai3_compile.Report:
    model, x = model.eval(), torch.randn(2, 3, 12, 15)
    # A graph that was compiled before would not ask what gains.
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        found, expected = compiled(model, **options)(x), model.double()(x.double())
    # Two convolutions, each as above, of values that the first has rounded.
    assert references.relative_error(found, expected) < 4 * BOUND
    return ai3_compile.last_report()


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("norm", [False, True])
def test_the_pass_takes_the_pooling_in(gains, rest, norm):
    report = checked(Net(nn.MaxPool2d(2), norm), rest=rest, conv2d="gemm")
    conv, pool = (next(row for row in report if row.name == name) for name in ("conv", "pool"))
    assert conv.computed == f"gemm@cpp{' + batch_norm' * norm} + relu + maxpool2d"
    assert (pool.algorithm, pool.why) == ("fused", "runs inside conv2d conv")
    assert gains == [1]


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(2, 1),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d((1, 2)),
        nn.AvgPool2d(2),
    ],
    ids=str,
)
def test_other_windows_are_left(gains, pool):
    assert not any("maxpool2d" in row.fused for row in checked(Net(pool), conv2d="gemm"))


@pytest.mark.parametrize("model", [Twice, Added])
def test_a_result_that_others_read_or_change_is_left(gains, model):
    report = checked(model(nn.MaxPool2d(2)), conv2d="gemm")
    assert not any("maxpool2d" in row.fused for row in report)


@pytest.mark.parametrize("options", [{"maxpool2d": "direct"}, {"fuse": False}])
def test_what_the_user_named_stays(gains, options):
    report = checked(Net(nn.MaxPool2d(2)), conv2d="gemm", **options)
    assert next(row for row in report if row.name == "pool").algorithm == "direct@cpp"


def test_no_algorithm_gains_on_a_cpu():
    report = checked(Net(nn.MaxPool2d(2)))
    assert next(row for row in report if row.name == "pool").algorithm == "direct@cpp"


# Direct convolution in plain loops, channels_last; MISTAKE is where one can be made.
POOLS = r"""
#include <ai3/activation.h>

#include <cmath>

static const char* supports(const ai3_args* a) {
  if (a->dtype != AI3_FLOAT32) return "needs float32";
  return a->groups == 1 ? nullptr : "needs groups 1";
}
static int32_t pools(const ai3_args* a) { return a->kernel_h == 3; }

static float at(const ai3_args* a, int64_t n, int64_t k, int64_t p, int64_t q) {
  const float* x = static_cast<const float*>(a->input.data);
  const float* w = static_cast<const float*>(a->weight.data);
  const int64_t C = a->input.size[1], H = a->input.size[2], W = a->input.size[3];
  double sum = a->bias ? static_cast<const float*>(a->bias)[k] : 0;
  for (int64_t c = 0; c < C; ++c)
    for (int64_t r = 0; r < a->kernel_h; ++r)
      for (int64_t s = 0; s < a->kernel_w; ++s) {
        const int64_t i = p * a->stride_h - a->pad_top + r * a->dilation_h;
        const int64_t j = q * a->stride_w - a->pad_left + s * a->dilation_w;
        if (i < 0 || i >= H || j < 0 || j >= W) continue;
        sum += x[((n * H + i) * W + j) * C + c] * w[((k * C + c) * a->kernel_h + r) * a->kernel_w + s];
      }
  const int64_t K = a->output.size[1], pixel = (n * a->output.size[2] + p) * a->output.size[3] + q;
  if (a->residual.data) sum += static_cast<const float*>(a->residual.data)[pixel * K + k];
  return ai3::activate(static_cast<float>(sum), a->activation);
}

static void run(const ai3_args* a) {
  const int64_t size = a->pools ? 2 : 1, P = a->output.size[2] / size, Q = a->output.size[3] / size;
  float* y = static_cast<float*>(a->output.data);
  for (int64_t n = 0; n < a->output.size[0]; ++n)
    for (int64_t p = 0; p < P; ++p)
      for (int64_t q = 0; q < Q; ++q)
        for (int64_t k = 0; k < a->output.size[1]; ++k) {
          float most = at(a, n, k, p * size, q * size);
          for (int64_t i = 1; i < size * size; ++i) {
            const float v = at(a, n, k, p * size + i / 2 MISTAKE, q * size + i % 2);
            if (v > most || std::isnan(v)) most = v;
          }
          *y++ = most;
        }
}

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) {
  static const ai3_kernel table = [] {
    ai3_kernel k{};
    k.abi_version = AI3_ABI_VERSION;
    k.operation = "conv2d";
    k.version = 1;
    k.flags = AI3_NHWC | AI3_EPILOGUE;
    k.supports = supports;
    k.pools = pools;
    k.run = run;
    return k;
  }();
  return &table;
}
"""


@pytest.fixture
def own(tmp_path):
    """Registers the algorithm for one test."""

    def register(mistake: str = "", table: str = "") -> None:
        path = tmp_path / "pools.cpp"
        path.write_text(POOLS.replace("MISTAKE", mistake).replace("k.run = run;", f"k.run = run; {table}"))
        ai3_compile.register_algorithm("conv2d", "pools", path)

    yield register
    for algorithm in registry.users():
        registry.remove(algorithm)


@pytest.mark.parametrize("rest", RESTS)
def test_an_algorithm_that_pools_computes_both(own, rest):
    own()
    report = checked(Net(nn.MaxPool2d(2), norm=True), rest=rest, conv2d="pools")
    rows = {row.name: row for row in report if row.operation == "conv2d"}
    assert rows["conv"].computed == "pools@cpp + batch_norm + relu + maxpool2d"
    assert rows["next"].computed == "pools@cpp"
    with torch.profiler.profile() as profile:
        args = arguments((8, 6))[:-2]
        ids = registry.find("conv2d", "pools").id, identity("maxpool2d")
        ops.conv2d_pooled(*args, *ids)
    names = {event.name for event in profile.events()}
    assert "ai3::conv2d[pools@cpp]" in names and not any("max_pool2d" in name for name in names)


def test_what_pools_applies_the_activation_before_it(own):
    """Also where it leaves others to the core library; GELU falls before it rises."""
    own(table="k.fuses = [](const ai3_args*) -> int32_t { return 0; };")
    args = arguments((8, 6))[:-2]
    ids = registry.find("conv2d", "pools").id, identity("maxpool2d")
    found = ops.conv2d_pooled(*args, *ids, activation=NUMBERS["gelu"])
    x, w, b = (t.double() for t in args[:3])
    expected = F.max_pool2d(F.gelu(F.conv2d(x, w, b, padding=1)), 2)
    assert references.relative_error(found, expected) < BOUND


@pytest.mark.parametrize("flags", ["AI3_NHWC", "AI3_NCHW | AI3_EPILOGUE"])
def test_a_table_that_cannot_pool_is_refused(own, flags):
    with pytest.raises(KernelLoadError, match=r"pools\(\) needs AI3_NHWC and AI3_EPILOGUE"):
        own(table=f"k.flags = {flags};")


def test_an_algorithm_that_pools_is_proven_with_it(own):
    own()
    assert check_algorithm("conv2d", "pools").passed


def test_an_algorithm_that_pools_wrongly_is_found(own):
    """It takes the first row of a window for the second."""
    own(mistake="* 0")
    with pytest.raises(AlgorithmCheckError, match="relative error"):
        check_algorithm("conv2d", "pools")


@pytest.mark.parametrize("can_pool", [True, False])
@pytest.mark.parametrize("algorithm", ["torch", "gemm@cpp", "pools@cpp"])
def test_what_auto_measures_has_the_pooling_behind(own, monkeypatch, algorithm, can_pool):
    """Also where no algorithm of ai3's pools there."""
    own()
    if not can_pool:
        monkeypatch.setattr(tuning, "_pooling", lambda spec: None)
    spec = OPERATIONS["conv2d"].spec("", (2, 4, 8, 6), (6, 4, 3, 3), True, torch.float32, "cpu", WINDOW)
    (chosen,) = (a for a in registry.known() if (a.operation, a.qualified) == ("conv2d", algorithm))
    made = [tuning._call(spec, chosen, Use(True, activation=1, pooled=pooled)) for pooled in (False, True)]
    plain, pooled = (call() for call, _ in made)
    assert references.relative_error(pooled, F.max_pool2d(plain, 2)) < BOUND
