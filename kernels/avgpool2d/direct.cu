// Direct average pooling: every window is summed once, in vectors of channels where they are innermost.
// Source: the definition, with the divisors of PyTorch's avg_pool2d (ceil_mode, count_include_pad, divisor_override).
#include <ai3/pool2d.cuh>

#ifdef __CUDACC__

struct AvgPool {
  static constexpr bool kMax = false;
  const ai3::PoolParams& a;

  // The window with its padding; a last window that ceil_mode adds is cut off at the padding's end.
  __device__ __forceinline__ ai3::Span padded_rows(int p) const {
    const int begin = p * a.stride_h - a.pad_top;
    return {begin, min(begin + a.kernel_h, a.height + a.pad_bottom), 1};
  }
  __device__ __forceinline__ ai3::Span padded_columns(int q) const {
    const int begin = q * a.stride_w - a.pad_left;
    return {begin, min(begin + a.kernel_w, a.width + a.pad_right), 1};
  }
  static __device__ __forceinline__ ai3::Span inside(ai3::Span span, int size) {
    return {max(span.begin, 0), min(span.end, size), 1};
  }
  __device__ __forceinline__ ai3::Span rows(int p) const { return inside(padded_rows(p), a.height); }
  __device__ __forceinline__ ai3::Span columns(int q) const { return inside(padded_columns(q), a.width); }

  template <typename S>
  __device__ __forceinline__ S divisor(int p, int q) const {
    if (a.divisor_override != 0) return S(a.divisor_override);
    const ai3::Span h = a.count_include_pad ? padded_rows(p) : rows(p);
    const ai3::Span w = a.count_include_pad ? padded_columns(q) : columns(q);
    // A window without a pixel is 0, not 0 / 0.
    return S(max(h.end - h.begin, 1)) * S(max(w.end - w.begin, 1));
  }
};

#define AI3_AVG_POOL(suffix, T)   \
  AI3_POOL_OF(AvgPool, suffix, T) \
  AI3_POOL_3X3_OF(AvgPool, suffix, T)
AI3_FOR_DTYPES(AI3_AVG_POOL)

#else

namespace {

const char* supports(const ai3_args* args) {
  if (args->dilation_h > 1 || args->dilation_w > 1) return "needs dilation 1";
  return ai3::pool_supports(args);
}

void run(const ai3_args* args) {
  ai3::pool_run(args, args->kernel_h * args->kernel_w, args->kernel_h == 3 && args->kernel_w == 3);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "avgpool2d",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = AI3_NCHW | AI3_NHWC | AI3_STRIDED_OUTPUT,
                           .supports = supports,
                           .cost = ai3::pool_cost,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }

#endif
