// Winograd of cuDNN in one kernel for the input's gradient; not offered on Hopper and later; deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_DATA_ALGO_WINOGRAD.
#include <conv.h>

AI3_CUDNN_KERNEL(GradInput::kWinograd, .name = "winograd", .flags = AI3_NCHW,
                 .rates = {.strict = 60, .tf32 = 60, .half = 60, .float64 = 5})
