// Winograd of cuDNN with its transforms in kernels of their own, for 3x3 kernels.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED.
#include <conv.h>

AI3_CUDNN_KERNEL(Forward::kWinogradNonfused, .name = "winograd nonfused", .flags = AI3_NCHW,
                 .rates = {.strict = 50, .tf32 = 50, .half = 50, .float64 = 5},
                 .only_by_name = "has up to ten times the rounding error")
