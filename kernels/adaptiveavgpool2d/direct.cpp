// Direct adaptive average pooling: every region is summed once, a block of channels at a time in vector registers.
// Source: the definition, with the regions of PyTorch's adaptive_avg_pool2d.
#include "ai3/pool2d.h"

namespace {

ai3::Span region(int64_t index, int64_t outputs, int64_t inputs) {
  return {index * inputs / outputs, ((index + 1) * inputs + outputs - 1) / outputs, 1};
}

struct AdaptiveAvgPool {
  static constexpr bool kWindows = false;  // regions of any size
  static ai3::Span rows(const ai3_args* args, int64_t p) {
    return region(p, args->output.size[2], args->input.size[2]);
  }
  static ai3::Span columns(const ai3_args* args, int64_t q) {
    return region(q, args->output.size[3], args->input.size[3]);
  }
  template <typename T>
  static ai3::Mean<T> reduce(const ai3_args* args, int64_t p, int64_t q) {
    const ai3::Span h = rows(args, p), w = columns(args, q);
    return {T((h.end - h.begin) * (w.end - w.begin))};
  }
};

double cost(const ai3_args* args) {
  const int64_t *in = args->input.size, *out = args->output.size;
  const double outputs = std::max(1.0, double(out[2]) * double(out[3]));
  return ai3::pool_cost(args, double(in[2]) * double(in[3]) / outputs);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "adaptiveavgpool2d",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = AI3_NHWC,
                           .supports = ai3::pool_supports,
                           .cost = cost,
                           .run = ai3::pool_run<AdaptiveAvgPool>};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
