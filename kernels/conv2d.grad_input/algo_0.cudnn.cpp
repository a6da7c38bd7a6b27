// cuDNN's sum of products with atomic additions; not deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_DATA_ALGO_0.
#include <conv.h>

AI3_CUDNN_KERNEL(GradInput::kAlgo0, .name = "algo 0", .flags = AI3_NCHW | AI3_NHWC,
                 .rates = {.strict = 25, .tf32 = 25, .half = 5, .float64 = 10})
