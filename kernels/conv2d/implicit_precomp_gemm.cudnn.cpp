// Implicit GEMM of cuDNN with precomputed offsets: the one named algorithm with tensor cores for every shape.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM.
#include <conv.h>

AI3_CUDNN_KERNEL(Forward::kImplicitPrecompGemm, .name = "implicit precomp gemm", .flags = AI3_NCHW | AI3_NHWC,
                 .rates = {.strict = 33, .tf32 = 150, .half = 250, .float64 = 14})
