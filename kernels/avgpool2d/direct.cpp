// Direct average pooling: every window is summed once, a block of channels at a time in vector registers.
// Source: the definition, with the divisors of PyTorch's avg_pool2d (ceil_mode, count_include_pad, divisor_override).
#include "ai3/pool2d.h"

namespace {

// The window with its padding; a last window that ceil_mode adds is cut off at the padding's end.
ai3::Span padded(int64_t index, int64_t kernel, int64_t stride, int64_t pad_begin, int64_t pad_end, int64_t size) {
  const int64_t begin = index * stride - pad_begin;
  return {begin, std::min(begin + kernel, size + pad_end), 1};
}
ai3::Span padded_rows(const ai3_args* args, int64_t p) {
  return padded(p, args->kernel_h, args->stride_h, args->pad_top, args->pad_bottom, args->input.size[2]);
}
ai3::Span padded_columns(const ai3_args* args, int64_t q) {
  return padded(q, args->kernel_w, args->stride_w, args->pad_left, args->pad_right, args->input.size[3]);
}
ai3::Span inside(ai3::Span span, int64_t size) {
  return {std::max<int64_t>(span.begin, 0), std::min(span.end, size), 1};
}

struct AvgPool {
  static constexpr bool kWindows = true;  // of kernel_h x kernel_w
  static ai3::Span rows(const ai3_args* args, int64_t p) { return inside(padded_rows(args, p), args->input.size[2]); }
  static ai3::Span columns(const ai3_args* args, int64_t q) {
    return inside(padded_columns(args, q), args->input.size[3]);
  }
  template <typename T>
  static ai3::Mean<T> reduce(const ai3_args* args, int64_t p, int64_t q) {
    if (args->divisor_override) return {T(args->divisor_override)};
    const ai3::Span h = args->count_include_pad ? padded_rows(args, p) : rows(args, p);
    const ai3::Span w = args->count_include_pad ? padded_columns(args, q) : columns(args, q);
    // A window without a pixel is 0, not 0 / 0.
    return {T(std::max<int64_t>(h.end - h.begin, 1) * std::max<int64_t>(w.end - w.begin, 1))};
  }
};

const char* supports(const ai3_args* args) {
  if (args->dilation_h > 1 || args->dilation_w > 1) return "needs dilation 1";
  return ai3::pool_supports(args);
}

double cost(const ai3_args* args) { return ai3::pool_cost(args, double(args->kernel_h) * double(args->kernel_w)); }

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "avgpool2d",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = AI3_NHWC | AI3_STRIDED_OUTPUT,
                           .supports = supports,
                           .cost = cost,
                           .run = ai3::pool_run<AvgPool>};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
