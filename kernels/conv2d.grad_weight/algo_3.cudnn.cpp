// cuDNN's algo 0 with precomputed offsets for the weight's gradient; not deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3.
#include <conv.h>

namespace {

using Algorithm = ai3::cudnn::Convolution<ai3::cudnn::GradWeight::kAlgo3>;

double cost(const ai3_args* args) {
  return Algorithm::cost(args, {.strict = 20, .tf32 = 20, .half = 12, .float64 = 10});
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d.grad_weight",
                           .algorithm = "algo 3",
                           .version = 1,
                           .flags = AI3_NCHW,
                           .supports = Algorithm::supports,
                           .cost = cost,
                           .workspace_bytes = Algorithm::workspace_bytes,
                           .run = Algorithm::run};

}  // namespace

AI3_CUDNN_KERNEL(Algorithm, kernel)
