// Winograd of cuDNN in several kernels for the input's gradient; deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_DATA_ALGO_WINOGRAD_NONFUSED.
#include <conv.h>

AI3_CUDNN_KERNEL(GradInput::kWinogradNonfused, .name = "winograd nonfused", .flags = AI3_NCHW,
                 .rates = {.strict = 55, .tf32 = 55, .half = 55, .float64 = 5})
