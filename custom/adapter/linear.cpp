// linear by the user's own linear.hpp.
#include <linear.hpp>

#include "adapter.h"

namespace ai3_adapter {
namespace {

template <typename dtype>
Tensor call(const ai3_args* args) {
  return ::linear_custom<dtype>(view(args, args->input), view(args, args->weight), bias(args));
}

const ai3_kernel kernel = table("linear", 0, DEFAULT_LINEAR, refusal, run<call<float>, call<double>>);

}  // namespace
}  // namespace ai3_adapter

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &ai3_adapter::kernel; }
