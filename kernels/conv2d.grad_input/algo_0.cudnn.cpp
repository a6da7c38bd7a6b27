// cuDNN's sum of products with atomic additions; not deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_DATA_ALGO_0.
#include <conv.h>

namespace {

using Algorithm = ai3::cudnn::Convolution<ai3::cudnn::GradInput::kAlgo0>;

double cost(const ai3_args* args) {
  return Algorithm::cost(args, {.strict = 25, .tf32 = 25, .half = 5, .float64 = 10});
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d.grad_input",
                           .algorithm = "algo 0",
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
