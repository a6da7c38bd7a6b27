// Direct max pooling: every window is read once, in vectors of channels where they are innermost.
// Source: the definition, as PyTorch's max_pool2d computes it: padding is -inf and a NaN of a window wins.
#include <ai3/pool2d.cuh>

#ifdef __CUDACC__

// Begins at the first tap inside the image, as taps in the padding never win.
__device__ __forceinline__ ai3::Span taps(int start, int kernel, int dilation, int size) {
  const int end = min(start + (kernel - 1) * dilation + 1, size);
  return {start < 0 ? start + (dilation - 1 - start) / dilation * dilation : start, end, dilation};
}

struct MaxPool {
  static constexpr bool kMax = true;
  const ai3::PoolParams& a;
  __device__ __forceinline__ ai3::Span rows(int p) const {
    return taps(p * a.stride_h - a.pad_top, a.kernel_h, a.dilation_h, a.height);
  }
  __device__ __forceinline__ ai3::Span columns(int q) const {
    return taps(q * a.stride_w - a.pad_left, a.kernel_w, a.dilation_w, a.width);
  }
};

#define AI3_MAX_POOL(suffix, T)   \
  AI3_POOL_OF(MaxPool, suffix, T) \
  AI3_POOL_3X3_OF(MaxPool, suffix, T)
AI3_FOR_DTYPES(AI3_MAX_POOL)

#else

namespace {

void run(const ai3_args* args) {
  ai3::pool_run(args, args->kernel_h * args->kernel_w, args->kernel_h == 3 && args->kernel_w == 3);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "maxpool2d",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = AI3_NCHW | AI3_NHWC | AI3_STRIDED_OUTPUT,
                           .supports = ai3::pool_supports,
                           .cost = ai3::pool_cost,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }

#endif
