// cuDNN's implicit GEMM for the input's gradient; tensor cores, deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_DATA_ALGO_1.
#include <conv.h>

AI3_CUDNN_KERNEL(GradInput::kAlgo1, .name = "algo 1", .flags = AI3_NCHW | AI3_NHWC,
                 .rates = {.strict = 23, .tf32 = 110, .half = 200, .float64 = 10})
