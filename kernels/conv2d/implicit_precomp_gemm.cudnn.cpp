// Implicit GEMM of cuDNN with precomputed offsets: the one named algorithm with tensor cores for every shape.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM.
#include <conv.h>

namespace {

using Algorithm = ai3::cudnn::Convolution<ai3::cudnn::Forward::kImplicitPrecompGemm>;

double cost(const ai3_args* args) {
  return Algorithm::cost(args, {.strict = 33, .tf32 = 150, .half = 250, .float64 = 14});
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "implicit precomp gemm",
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
