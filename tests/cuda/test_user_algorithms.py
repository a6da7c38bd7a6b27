"""A CUDA algorithm of the user's own, through every entry."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ai3_compile as ai3
from ai3_compile import errors
from ai3_compile.errors import BuildError, RegistrationError

SOURCE = """// Doubles what is positive, which is no relu: its own results show that it ran.
#include <ai3/cuda.h>
struct Params { const float* in; float* out; long long count; };
#ifdef __CUDACC__
AI3_KERNEL(256, twice, Params) {
  const long long i = blockIdx.x * 256ll + threadIdx.x;
  if (i < p.count) p.out[i] = p.in[i] > 0 ? 2 * p.in[i] : 0;
}
#else
namespace {
using namespace ai3::cuda;
const char* supports(const ai3_args* a) { return a->dtype == AI3_FLOAT32 ? nullptr : "needs float32"; }
void run(const ai3_args* a) {
  const Params p{static_cast<const float*>(a->input.data), static_cast<float*>(a->output.data), a->input.size[0]};
  launch(a, "twice", {ceil_div(p.count, 256)}, 256, 0, p);
}
const ai3_kernel table = [] {
  ai3_kernel k{};
  k.abi_version = AI3_ABI_VERSION;
  k.operation = "relu";
  k.algorithm = "twice";
  k.version = 1;
  k.supports = supports;
  k.run = run;
  return k;
}();
}  // namespace
extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &table; }
#endif
"""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def twice(tmp_path):
    (tmp_path / "twice.cu").write_text(SOURCE)
    algorithm = ai3.register_algorithm("relu", "twice", tmp_path / "twice.cu")
    yield algorithm
    ai3.unregister_algorithm("relu", "twice")
    torch._dynamo.reset()


@needs_gpu
@pytest.mark.parametrize("way", ["swap", "convert", "eager", "reduce-overhead"])
def test_it_runs_through_every_entry(twice, way):
    assert twice.qualified == "twice@cuda" and twice.description.startswith("Doubles")
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).cuda().eval(), torch.randn(2, 3, 9, 9, device="cuda")
    with torch.no_grad():
        expected = 2 * model(x)
        if way == "swap":
            ai3.swap_operation("relu", model, "twice")
            found = model(x)
        elif way == "convert":
            found = ai3.convert(model, {"relu": "twice"}, (2, 3, 9, 9))(x)
        else:
            options = {"relu": "twice", **({"rest": "eager"} if way == "eager" else {"mode": way})}
            run = torch.compile(model, backend="ai3", options=options)
            for _ in range(3):
                found = run(x).clone()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@needs_gpu
def test_it_is_checked_and_compared_on_the_gpu(twice):
    with pytest.raises(errors.AlgorithmCheckError, match="relative error"):
        ai3.testing.check_algorithm("relu", "twice")  # it doubles
    report = ai3.testing.check_algorithm("relu", "direct@cuda")
    assert report.passed and {row.dtype for row in report.rows} == {"float32", "float64", "float16", "bfloat16"}
    compared = ai3.compare("relu", [(1, 64, 56, 56)], device="cuda", rounds=3)
    assert {"torch", "direct@cuda", "twice@cuda"} == {row.algorithm for row in compared.rows}
    assert compared.gpu in compared.title and all(row.milliseconds for row in compared.rows)


@needs_gpu
def test_what_does_not_compile_is_said_with_the_compilers_words(tmp_path):
    (tmp_path / "broken.cu").write_text(SOURCE.replace("p.in[i] > 0", "p.inn[i] > 0"))
    with pytest.raises(BuildError, match="inn"):
        ai3.register_algorithm("relu", "broken", tmp_path / "broken.cu")


@needs_gpu
def test_a_kernel_that_faults_is_refused_and_takes_nothing_along(tmp_path):
    (tmp_path / "faults.cu").write_text(SOURCE.replace("p.out[i] =", "p.out[i + (1ll << 40)] ="))
    with pytest.raises(errors.AlgorithmError, match="it ended the process that tried it"):
        ai3.register_algorithm("relu", "faults", tmp_path / "faults.cu")
    assert torch.ones(3, device="cuda").sum() == 3
    assert "faults" not in [a.name for a in ai3.algorithms() if a.operation == "relu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_nothing_is_checked_or_compared_there():
    with pytest.raises(errors.AlgorithmError, match=r"direct@cuda\]: it cannot run here: PyTorch"):
        ai3.testing.check_algorithm("relu", "direct@cuda")
    with pytest.raises(errors.OptionValueError, match="'cuda' where there is one"):
        ai3.compare("relu", [(1, 64)], device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_it_is_refused(tmp_path):
    (tmp_path / "twice.cu").write_text(SOURCE)
    with pytest.raises(RegistrationError, match="for NVIDIA GPUs: PyTorch"):
        ai3.register_algorithm("relu", "twice", tmp_path / "twice.cu")
