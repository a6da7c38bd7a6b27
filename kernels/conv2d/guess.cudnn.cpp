// Fused plan of cuDNN's graph API with bias, residual and activation: the first that cuDNN's heuristics recommend.
// Source: NVIDIA cuDNN's backend API, heuristics A, then B, then the fallback.
#include <conv.h>

namespace {

using Algorithm = ai3::cudnn::Convolution<ai3::cudnn::Choice::kGuess>;

double cost(const ai3_args* args) {
  return Algorithm::cost(args, {.strict = 33, .tf32 = 200, .half = 350, .float64 = 14});
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "guess",
                           .version = 1,
                           .flags = AI3_NCHW | AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_INPUT | AI3_STRIDED_OUTPUT,
                           .supports = Algorithm::supports,
                           .cost = cost,
                           .workspace_bytes = Algorithm::workspace_bytes,
                           .packed_bytes = Algorithm::packed_bytes,
                           .pack = Algorithm::pack,
                           .pack_variant = Algorithm::pack_variant,
                           .fuses = Algorithm::fuses,
                           .run = Algorithm::run};

}  // namespace

AI3_CUDNN_KERNEL(Algorithm, kernel)
