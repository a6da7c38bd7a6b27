// Explicit GEMM of cuDNN: the im2col matrix is written to a workspace and multiplied.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_FWD_ALGO_GEMM.
#include <conv.h>

namespace {

using Algorithm = ai3::cudnn::Convolution<ai3::cudnn::Forward::kGemm>;

double cost(const ai3_args* args) {
  return Algorithm::cost(args, {.strict = 15, .tf32 = 15, .half = 15, .float64 = 13});
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "gemm",
                           .version = 1,
                           .flags = AI3_NCHW,
                           .supports = Algorithm::supports,
                           .cost = cost,
                           .workspace_bytes = Algorithm::workspace_bytes,
                           .run = Algorithm::run};

}  // namespace

AI3_CUDNN_KERNEL(Algorithm, kernel)
