// Direct max pooling: every window is read once, a block of channels at a time in vector registers.
// Source: the definition, as PyTorch's max_pool2d computes it: padding is -inf and the first NaN of a window wins.
#include <limits>

#include "ai3/pool2d.h"

namespace {

template <typename T>
struct Max {
  static constexpr T identity = -std::numeric_limits<T>::infinity();
  template <typename V>
  static V combine(V a, V b) {
    return ((b > a) | (b != b)) ? b : a;
  }
  template <typename V>
  V finish(V total) const {
    return total;
  }
};

// Begins at the first tap inside the image, as taps in the padding never win.
ai3::Span taps(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
  const int64_t end = std::min(start + (kernel - 1) * dilation + 1, size);
  return {start < 0 ? start + (dilation - 1 - start) / dilation * dilation : start, end, dilation};
}

struct MaxPool {
  static constexpr bool kWindows = true;  // of kernel_h x kernel_w
  static ai3::Span rows(const ai3_args* args, int64_t p) {
    return taps(p * args->stride_h - args->pad_top, args->kernel_h, args->dilation_h, args->input.size[2]);
  }
  static ai3::Span columns(const ai3_args* args, int64_t q) {
    return taps(q * args->stride_w - args->pad_left, args->kernel_w, args->dilation_w, args->input.size[3]);
  }
  template <typename T>
  static Max<T> reduce(const ai3_args*, int64_t, int64_t) {
    return {};
  }
};

double cost(const ai3_args* args) { return ai3::pool_cost(args, double(args->kernel_h) * double(args->kernel_w)); }

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "maxpool2d",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = AI3_NHWC | AI3_STRIDED_OUTPUT,
                           .supports = ai3::pool_supports,
                           .cost = cost,
                           .run = ai3::pool_run<MaxPool>};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
