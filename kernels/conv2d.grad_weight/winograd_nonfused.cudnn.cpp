// Winograd of cuDNN in several kernels for the weight's gradient; deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_FILTER_ALGO_WINOGRAD_NONFUSED.
#include <conv.h>

AI3_CUDNN_KERNEL(GradWeight::kWinogradNonfused, .name = "winograd nonfused", .flags = AI3_NCHW,
                 .rates = {.strict = 60, .tf32 = 60, .half = 60, .float64 = 5})
