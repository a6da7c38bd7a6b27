// FFT of cuDNN by tiles for the weight's gradient; deterministic.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_BWD_FILTER_ALGO_FFT_TILING.
#include <conv.h>

AI3_CUDNN_KERNEL(GradWeight::kFftTiling, .name = "fft tiling", .flags = AI3_NCHW,
                 .rates = {.strict = 20, .tf32 = 20, .half = 20, .float64 = 5})
