// cuDNN's algo 0 with precomputed offsets for the weight's gradient; not deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3.
#include <conv.h>

AI3_CUDNN_KERNEL(GradWeight::kAlgo3, .name = "algo 3", .flags = AI3_NCHW,
                 .rates = {.strict = 20, .tf32 = 20, .half = 12, .float64 = 10})
