// Direct relu: one pass over contiguous elements.
// Source: the definition; a NaN stays a NaN, as in PyTorch.
#include <algorithm>
#include <cassert>

#include "ai3/kernel.h"

namespace {

constexpr int64_t kBlock = 32768;  // elements a thread takes at least: fewer are done before a second one starts

template <typename T>
void relu_range(void* arg, int64_t begin, int64_t end) {
  const auto* args = static_cast<const ai3_args*>(arg);
  const T* in = static_cast<const T*>(args->input.data);
  T* out = static_cast<T*>(args->output.data);
  const int64_t last = std::min(end * kBlock, args->output.size[0]);
  for (int64_t i = begin * kBlock; i < last; ++i) out[i] = in[i] < 0 ? T(0) : in[i];
}

const char* supports(const ai3_args* args) {
  return args->dtype == AI3_FLOAT32 || args->dtype == AI3_FLOAT64 ? nullptr : "needs float32 or float64";
}

double cost(const ai3_args* args) {
  return double(args->output.size[0]) * 2 * (args->dtype == AI3_FLOAT64 ? 8 : 4) / 20;
}

void run(const ai3_args* args) {
  assert(args->input.ndim == 1 && args->output.ndim == 1 && args->input.size[0] == args->output.size[0]);
  assert(args->input.data && args->output.data && args->runtime && !supports(args));
  const auto body = args->dtype == AI3_FLOAT64 ? relu_range<double> : relu_range<float>;
  args->runtime->parallel_for((args->output.size[0] + kBlock - 1) / kBlock, body, const_cast<ai3_args*>(args));
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "relu",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = 0,
                           .supports = supports,
                           .cost = cost,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
