// cuDNN's sum of products with atomic additions for the weight's gradient; not deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0.
#include <conv.h>

AI3_CUDNN_KERNEL(GradWeight::kAlgo0, .name = "algo 0", .flags = AI3_NCHW | AI3_NHWC,
                 .rates = {.strict = 20, .tf32 = 20, .half = 15, .float64 = 10})
