// Implicit GEMM of cuDNN: the im2col matrix is never stored, and there is no workspace.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM.
#include <conv.h>

namespace {

using Algorithm = ai3::cudnn::Convolution<ai3::cudnn::Forward::kImplicitGemm>;

double cost(const ai3_args* args) {
  return Algorithm::cost(args, {.strict = 20, .tf32 = 20, .half = 20, .float64 = 8});
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "implicit gemm",
                           .version = 1,
                           .flags = AI3_NCHW | AI3_NHWC,
                           .supports = Algorithm::supports,
                           .cost = cost,
                           .workspace_bytes = Algorithm::workspace_bytes,
                           .packed_bytes = Algorithm::packed_bytes,
                           .pack = Algorithm::pack,
                           .pack_variant = Algorithm::pack_variant,
                           .run = Algorithm::run};

}  // namespace

AI3_CUDNN_KERNEL(Algorithm, kernel)
