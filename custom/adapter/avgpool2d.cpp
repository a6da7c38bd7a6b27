// avgpool2d by the user's own avgpool2d.hpp.
#include <avgpool2d.hpp>

#include "adapter.h"

namespace ai3_adapter {
namespace {

template <typename dtype>
Tensor call(const ai3_args* args) {
  std::optional<int> divisor;
  if (args->divisor_override != 0) divisor = int(args->divisor_override);
  return ::avgpool2d_custom<dtype>(view(args, args->input), uint(args->kernel_h), uint(args->kernel_w),
                                   uint(args->pad_top), uint(args->pad_left), uint(args->stride_h),
                                   uint(args->stride_w), args->ceil_mode != 0, args->count_include_pad != 0, divisor);
}

const char* supports(const ai3_args* args) {
  if (const char* reason = window_refusal(args)) return reason;
  if (args->dilation_h > 1 || args->dilation_w > 1) return "needs a dilation of 1";
  return int(args->divisor_override) == args->divisor_override ? nullptr : "needs a divisor below 2^31";
}

const ai3_kernel kernel = table("avgpool2d", AI3_NCHW, DEFAULT_AVGPOOL2D, supports, run<call<float>, call<double>>);

}  // namespace
}  // namespace ai3_adapter

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &ai3_adapter::kernel; }
