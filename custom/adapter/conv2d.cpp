// conv2d by the user's own conv2d.hpp. Padding that is not zeros is in the input already.
#include <conv2d.hpp>

#include "adapter.h"

namespace ai3_adapter {
namespace {

template <typename dtype>
Tensor call(const ai3_args* args) {
  return ::conv2d_custom<dtype>(view(args, args->input), view(args, args->weight), bias(args), uint(args->pad_top),
                                uint(args->pad_left), uint(args->stride_h), uint(args->stride_w),
                                uint(args->dilation_h), uint(args->dilation_w), PaddingMode::Zeros, uint(args->groups));
}

const ai3_kernel kernel = table("conv2d", AI3_NCHW, DEFAULT_CONV2D, window_refusal, run<call<float>, call<double>>);

}  // namespace
}  // namespace ai3_adapter

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &ai3_adapter::kernel; }
