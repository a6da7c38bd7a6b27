// FFT of cuDNN by tiles of 32x32 pixels: a smaller workspace than fft for large images.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_FWD_ALGO_FFT_TILING.
#include <conv.h>

AI3_CUDNN_KERNEL(Forward::kFftTiling, .name = "fft tiling", .flags = AI3_NCHW,
                 .rates = {.strict = 20, .tf32 = 20, .half = 20, .float64 = 5})
