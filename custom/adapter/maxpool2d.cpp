// maxpool2d by the user's own maxpool2d.hpp.
#include <maxpool2d.hpp>

#include "adapter.h"

namespace ai3_adapter {
namespace {

template <typename dtype>
Tensor call(const ai3_args* args) {
  return ::maxpool2d_custom<dtype>(
      view(args, args->input), uint(args->kernel_h), uint(args->kernel_w), uint(args->pad_top), uint(args->pad_left),
      uint(args->stride_h), uint(args->stride_w), uint(args->dilation_h), uint(args->dilation_w), args->ceil_mode != 0);
}

const ai3_kernel kernel =
    table("maxpool2d", AI3_NCHW, DEFAULT_MAXPOOL2D, window_refusal, run<call<float>, call<double>>);

}  // namespace
}  // namespace ai3_adapter

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &ai3_adapter::kernel; }
