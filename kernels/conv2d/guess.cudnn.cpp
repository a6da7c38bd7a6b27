// Fused plan of cuDNN's graph API with bias, residual and activation: the first that cuDNN's heuristics recommend.
// Source: NVIDIA cuDNN's backend API, heuristics A, then B, then the fallback.
#include <conv.h>

AI3_CUDNN_KERNEL(Choice::kGuess, .name = "guess", .flags = AI3_NCHW | AI3_NHWC | AI3_EPILOGUE,
                 .rates = {.strict = 33, .tf32 = 200, .half = 350, .float64 = 14})
