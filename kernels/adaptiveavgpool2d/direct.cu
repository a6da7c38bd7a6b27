// Direct adaptive average pooling: every region is summed once, by a warp or a block where it is large.
// Source: the definition, with the regions of PyTorch's adaptive_avg_pool2d.
#include <ai3/pool2d.cuh>

#ifdef __CUDACC__

struct AdaptiveAvgPool {
  static constexpr bool kMax = false;
  const ai3::PoolParams& a;
  static __device__ __forceinline__ ai3::Span region(int index, int outputs, int inputs) {
    const int64_t begin = int64_t(index) * inputs;
    return {int(begin / outputs), int((begin + inputs + outputs - 1) / outputs), 1};
  }
  __device__ __forceinline__ ai3::Span rows(int p) const { return region(p, a.out_height, a.height); }
  __device__ __forceinline__ ai3::Span columns(int q) const { return region(q, a.out_width, a.width); }
  template <typename S>
  __device__ __forceinline__ S divisor(int p, int q) const {
    const ai3::Span h = rows(p), w = columns(q);
    return S(h.end - h.begin) * S(w.end - w.begin);
  }
};

#define AI3_ADAPTIVE_AVG_POOL(suffix, T) AI3_POOL_OF(AdaptiveAvgPool, suffix, T)
AI3_FOR_DTYPES(AI3_ADAPTIVE_AVG_POOL)

#else

namespace {

void run(const ai3_args* args) {
  // A region is at most one row and one column larger than the ratio of the sizes.
  const auto most = [&](int d) {
    return std::min(args->input.size[d], ai3::cuda::ceil_div(args->input.size[d], args->output.size[d]) + 1);
  };
  ai3::pool_run(args, most(2) * most(3), false);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "adaptiveavgpool2d",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = AI3_NCHW | AI3_NHWC | AI3_STRIDED_OUTPUT,
                           .supports = ai3::pool_supports,
                           .cost = ai3::pool_cost,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }

#endif
