// Winograd of cuDNN with its transforms in kernels of their own, for 3x3 kernels.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED.
#include <conv.h>

namespace {

using Algorithm = ai3::cudnn::Convolution<ai3::cudnn::Forward::kWinogradNonfused>;

double cost(const ai3_args* args) {
  return Algorithm::cost(args, {.strict = 50, .tf32 = 50, .half = 50, .float64 = 5});
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "winograd nonfused",
                           .version = 1,
                           .flags = AI3_NCHW,
                           .supports = Algorithm::supports,
                           .cost = cost,
                           .only_by_name = "has up to ten times the rounding error",
                           .workspace_bytes = Algorithm::workspace_bytes,
                           .run = Algorithm::run};

}  // namespace

AI3_CUDNN_KERNEL(Algorithm, kernel)
