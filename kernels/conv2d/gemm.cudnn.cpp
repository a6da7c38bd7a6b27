// Explicit GEMM of cuDNN: the im2col matrix is written to a workspace and multiplied.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_FWD_ALGO_GEMM.
#include <conv.h>

AI3_CUDNN_KERNEL(Forward::kGemm, .name = "gemm", .flags = AI3_NCHW,
                 .rates = {.strict = 15, .tf32 = 15, .half = 15, .float64 = 13})
