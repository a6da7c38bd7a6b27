// flatten by the user's own flatten.hpp, which may work in place: its input is a contiguous copy, in the output's
// memory.
#include <flatten.hpp>

#include "adapter.h"

namespace ai3_adapter {
namespace {

// Writes the elements from dimension `dim` on in their logical order; returns the place behind the last.
template <typename dtype>
dtype* copy(const ai3_tensor& from, int32_t dim, const dtype* in, dtype* out) {
  if (dim == from.ndim) {
    *out = *in;
    return out + 1;
  }
  const int64_t size = from.size[dim], stride = from.stride[dim];
  if (dim + 1 == from.ndim) {
    for (int64_t i = 0; i < size; ++i) out[i] = in[i * stride];
    return out + size;
  }
  for (int64_t i = 0; i < size; ++i) out = copy(from, dim + 1, in + i * stride, out);
  return out;
}

template <typename dtype>
Tensor call(const ai3_args* args) {
  copy(args->input, 0, static_cast<const dtype*>(args->input.data), static_cast<dtype*>(args->output.data));
  // The order of the elements is the same whichever dimensions are flattened; the output has one dimension here.
  return ::flatten_custom<dtype>(Tensor(args->output.data, shape_of(args->input), false, scalar_type(args)), 0, -1);
}

const ai3_kernel kernel = table("flatten", 0, DEFAULT_FLATTEN, refusal, run<call<float>, call<double>>);

}  // namespace
}  // namespace ai3_adapter

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &ai3_adapter::kernel; }
