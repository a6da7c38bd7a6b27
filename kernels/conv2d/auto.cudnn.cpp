// Fused plan of cuDNN's graph API with bias, residual and activation: the fastest of all, where it has been searched.
// Source: NVIDIA cuDNN's backend API; the plan that a search has stored, or else guess's. It has no estimate, so that
// no policy but the one that searches takes it.
#include <conv.h>

namespace {

using Algorithm = ai3::cudnn::Convolution<ai3::cudnn::Choice::kAuto>;

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "auto",
                           .version = 1,
                           .flags = AI3_NCHW | AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_INPUT | AI3_STRIDED_OUTPUT,
                           .supports = Algorithm::supports,
                           .workspace_bytes = Algorithm::workspace_bytes,
                           .packed_bytes = Algorithm::packed_bytes,
                           .pack = Algorithm::pack,
                           .pack_variant = Algorithm::pack_variant,
                           .fuses = Algorithm::fuses,
                           .run = Algorithm::run};

}  // namespace

AI3_CUDNN_KERNEL(Algorithm, kernel)
