// cuDNN's implicit GEMM for the weight's gradient; tensor cores, deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1.
#include <conv.h>

AI3_CUDNN_KERNEL(GradWeight::kAlgo1, .name = "algo 1", .flags = AI3_NCHW | AI3_NHWC,
                 .rates = {.strict = 20, .tf32 = 90, .half = 200, .float64 = 10})
