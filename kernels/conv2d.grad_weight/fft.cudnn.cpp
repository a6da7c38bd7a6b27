// FFT of cuDNN for the weight's gradient, in a large workspace; deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_FILTER_ALGO_FFT.
#include <conv.h>

AI3_CUDNN_KERNEL(GradWeight::kFft, .name = "fft", .flags = AI3_NCHW,
                 .rates = {.strict = 20, .tf32 = 20, .half = 20, .float64 = 5})
