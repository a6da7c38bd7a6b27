// FFT of cuDNN: products of the whole images' spectra, in a large workspace.
// Source: NVIDIA cuDNN's CUDNN_CONVOLUTION_FWD_ALGO_FFT.
#include <conv.h>

AI3_CUDNN_KERNEL(Forward::kFft, .name = "fft", .flags = AI3_NCHW,
                 .rates = {.strict = 20, .tf32 = 20, .half = 20, .float64 = 5})
