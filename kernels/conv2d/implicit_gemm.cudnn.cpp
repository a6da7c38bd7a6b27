// Implicit GEMM of cuDNN: the im2col matrix is never stored, and there is no workspace.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM.
#include <conv.h>

AI3_CUDNN_KERNEL(Forward::kImplicitGemm, .name = "implicit gemm", .flags = AI3_NCHW | AI3_NHWC,
                 .rates = {.strict = 20, .tf32 = 20, .half = 20, .float64 = 8})
