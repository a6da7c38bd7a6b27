// Fused plan of cuDNN's graph API with bias, residual and activation: the fastest of all, where it has been searched.
// Source: NVIDIA cuDNN's backend API; the plan that a search has stored, or else guess's. It has no estimate, so that
// no policy but the one that searches takes it.
#include <conv.h>

AI3_CUDNN_KERNEL(Choice::kAuto, .name = "auto", .flags = AI3_NCHW | AI3_NHWC | AI3_EPILOGUE)
