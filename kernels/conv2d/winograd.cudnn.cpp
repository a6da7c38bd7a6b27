// Winograd of cuDNN in one kernel, for 3x3 kernels; not offered on Hopper and later.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD.
#include <conv.h>

AI3_CUDNN_KERNEL(Forward::kWinograd, .name = "winograd", .flags = AI3_NCHW,
                 .rates = {.strict = 60, .tf32 = 60, .half = 60, .float64 = 5})
