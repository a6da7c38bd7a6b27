// adaptiveavgpool2d by the user's own adaptiveavgpool2d.hpp.
#include <adaptiveavgpool2d.hpp>

#include "adapter.h"

namespace ai3_adapter {
namespace {

template <typename dtype>
Tensor call(const ai3_args* args) {
  return ::adaptiveavgpool2d_custom<dtype>(view(args, args->input), uint(args->output.size[2]),
                                           uint(args->output.size[3]));
}

const ai3_kernel kernel =
    table("adaptiveavgpool2d", AI3_NCHW, DEFAULT_ADAPTIVEAVGPOOL2D, refusal, run<call<float>, call<double>>);

}  // namespace
}  // namespace ai3_adapter

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &ai3_adapter::kernel; }
