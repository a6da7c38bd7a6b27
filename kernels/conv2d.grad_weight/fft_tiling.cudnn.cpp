// FFT of cuDNN by tiles for the weight's gradient; deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_FILTER_ALGO_FFT_TILING.
#include <conv.h>

namespace {

using Algorithm = ai3::cudnn::Convolution<ai3::cudnn::GradWeight::kFftTiling>;

double cost(const ai3_args* args) {
  return Algorithm::cost(args, {.strict = 20, .tf32 = 20, .half = 20, .float64 = 5});
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d.grad_weight",
                           .algorithm = "fft tiling",
                           .version = 1,
                           .flags = AI3_NCHW,
                           .supports = Algorithm::supports,
                           .cost = cost,
                           .workspace_bytes = Algorithm::workspace_bytes,
                           .run = Algorithm::run};

}  // namespace

AI3_CUDNN_KERNEL(Algorithm, kernel)
