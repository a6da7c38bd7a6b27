// Direct convolution: tiles of output pixels by filters, summed tap by tap from the image as it lies; no lowering.
// Source: Zhang, Franchetti and Low, "High Performance Zero-Memory Overhead Direct Convolutions", ICML 2018, arXiv
// 1809.10170, on tiles in shared memory. Depthwise convolutions take a second path, which runs along the channels.
#include <ai3/depthwise.cuh>
#include <ai3/direct_tile.cuh>

namespace {

using namespace ai3::direct;

struct PackParams {
  const void* weight;
  void* packed;
  int64_t count;
  int32_t depth, padded_depth, taps, group_filters, padded_filters;
  ai3::Divider group_channels;
};

}  // namespace

#ifdef __CUDACC__

// [group][tap][channel][filter], zeros where a tile has more channels or filters than there are.
template <typename T>
__device__ __forceinline__ void pack(const PackParams& p) {
  const int64_t i = int64_t(blockIdx.x) * ai3::kWindowThreads + threadIdx.x;
  if (i >= p.count) return;
  const int filter = int(i % p.padded_filters), step = int(i / p.padded_filters % p.padded_depth);
  const int64_t group = i / p.padded_filters / p.padded_depth;
  unsigned channel;
  const int tap = int(p.group_channels.divide(step, channel));
  const bool inside = filter < p.group_filters && step < p.depth;
  const T* weight = static_cast<const T*>(p.weight) + (group * p.group_filters + filter) * p.depth;
  static_cast<T*>(p.packed)[i] = inside ? weight[int64_t(channel) * p.taps + tap] : ai3::narrow<T>(0);
}

#define AI3_DIRECT(suffix, T)                                                            \
  AI3_KERNEL_BLOCKS(kThreads, 3, wide_##suffix, Params) { compute<kWideFilters, T>(p); } \
  AI3_KERNEL_BLOCKS(kThreads, 2, few_##suffix, Params) { compute<kFewFilters, T>(p); }   \
  AI3_KERNEL(ai3::kWindowThreads, pack_##suffix, PackParams) { pack<T>(p); }
AI3_FOR_DTYPES(AI3_DIRECT)
AI3_FOR_DTYPES(AI3_DEPTHWISE)
#define AI3_DIRECT_DEPTHWISE(suffix, T) \
  AI3_DEPTHWISE_SQUARE(3, 1, suffix, T) \
  AI3_DEPTHWISE_SQUARE(3, 2, suffix, T) \
  AI3_DEPTHWISE_SQUARE(5, 1, suffix, T) \
  AI3_DEPTHWISE_SQUARE(5, 2, suffix, T)
AI3_DIRECT_DEPTHWISE(f32, float)
AI3_DIRECT_DEPTHWISE(f16, ai3::Half)
AI3_DIRECT_DEPTHWISE(bf16, ai3::BFloat16)

#else

namespace {

using ai3::cuda::ceil_div;

struct Sizes {
  int64_t groups, channels, filters, taps, depth, padded_depth, padded_filters, tile_filters;  // of a group
  explicit Sizes(const ai3_args* a)
      : groups(std::max<int64_t>(1, a->groups)),
        channels(a->weight.size[1]),
        filters(a->weight.size[0] / groups),
        taps(a->kernel_h * a->kernel_w),
        depth(channels * taps),
        padded_depth(depth),
        padded_filters(filters),
        tile_filters(filters > kFewFilters ? kWideFilters : kFewFilters) {
    if (ai3::is_depthwise(a)) {
      groups = 1, filters = padded_filters = a->weight.size[0];
      return;
    }
    const int64_t steps = kStepBytes / (a->dtype == AI3_FLOAT64 ? 8 : 4);
    padded_depth = ceil_div(depth, steps) * steps, padded_filters = ceil_div(filters, tile_filters) * tile_filters;
  }
};

const char* supports(const ai3_args* a) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (a->dtype == AI3_OTHER) return "needs a floating-point dtype";
  const auto image = [](const ai3_tensor& t) { return t.size[1] * t.size[2] * t.size[3]; };
  if (image(a->input) >= kLimit || image(a->output) >= kLimit) return "needs images of fewer than 2^31 elements";
  const bool few = a->output.size[0] * a->output.size[2] * a->output.size[3] < kLimit;
  return few ? nullptr : "needs fewer than 2^31 output pixels";
}

size_t packed_bytes(const ai3_args* a) {
  const Sizes s(a);
  return static_cast<size_t>(s.groups * s.padded_depth * s.padded_filters * ai3::dtype_bytes(a->dtype));
}

void pack(const ai3_args* a, void* dst) {
  const Sizes s(a);
  const int64_t count = s.groups * s.padded_depth * s.padded_filters;
  const PackParams p{a->weight.data,
                     dst,
                     count,
                     static_cast<int32_t>(s.depth),
                     static_cast<int32_t>(s.padded_depth),
                     static_cast<int32_t>(s.taps),
                     static_cast<int32_t>(s.filters),
                     static_cast<int32_t>(s.padded_filters),
                     ai3::divider(s.channels)};
  ai3::cuda::launch(a, ai3::dtype_name("pack", a->dtype).c_str(), {ceil_div(count, ai3::kWindowThreads)},
                    ai3::kWindowThreads, 0, p);
}

int32_t vector_outputs(const ai3_args* a, const Sizes& s) {
  constexpr int64_t kCount = 4;
  const int64_t bytes = kCount * ai3::dtype_bytes(a->dtype);
  const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % static_cast<size_t>(bytes) == 0; };
  const ai3_tensor& out = a->output;
  if (!aligned(out.data) || !aligned(a->residual.data) || bytes > ai3::kVectorBytes) return 0;
  if (out.stride[1] == 1)
    return s.filters % kCount == 0 && out.stride[3] % kCount == 0 && out.stride[2] % kCount == 0 &&
                   out.stride[0] % kCount == 0
               ? kVectorFilters
               : 0;
  const bool rows = out.stride[3] == 1 && out.stride[2] == out.size[3];
  return rows && out.size[2] * out.size[3] % kCount == 0 ? kVectorPixels : 0;
}

void run(const ai3_args* a) {
  if (ai3::is_depthwise(a)) return ai3::depthwise_run(a);
  const Sizes s(a);
  const bool wide = s.tile_filters == kWideFilters;
  const int64_t sum_bytes = a->dtype == AI3_FLOAT64 ? 8 : 4, tile_pixels = kThreads * kRows * kColumns / s.tile_filters;
  const int64_t steps = kStepBytes / sum_bytes / std::max<int64_t>(1, kThreads / tile_pixels);
  Params p{};
  p.in = a->input.data, p.weight = a->packed, p.bias = a->bias, p.residual = a->residual.data, p.out = a->output.data;
  p.in_stride = ai3::strides_of(a->input), p.out_stride = ai3::strides_of(a->output);
  p.group_weights = s.padded_depth * s.padded_filters;
  p.pixels = static_cast<int32_t>(a->output.size[0] * a->output.size[2] * a->output.size[3]);
  p.height = static_cast<int32_t>(a->input.size[2]), p.width = static_cast<int32_t>(a->input.size[3]);
  p.stride_h = static_cast<int32_t>(a->stride_h), p.stride_w = static_cast<int32_t>(a->stride_w);
  p.dilation_h = static_cast<int32_t>(a->dilation_h), p.dilation_w = static_cast<int32_t>(a->dilation_w);
  p.pad_top = static_cast<int32_t>(a->pad_top), p.pad_left = static_cast<int32_t>(a->pad_left);
  p.depth = static_cast<int32_t>(s.depth), p.group_filters = static_cast<int32_t>(s.filters);
  p.padded_filters = static_cast<int32_t>(s.padded_filters), p.activation = a->activation;
  p.whole_steps = s.channels % steps == 0;
  p.vector_steps = p.whole_steps && ai3::vector_lanes(a->dtype, a->input) > 1;
  p.vector_outputs = vector_outputs(a, s);
  p.out_columns = ai3::divider(a->output.size[3]), p.out_rows = ai3::divider(a->output.size[2]);
  p.group_channels = ai3::divider(s.channels), p.kernel_w = ai3::divider(a->kernel_w);
  p.filter_tiles = ai3::divider(s.padded_filters / s.tile_filters);
  p.tiles = ai3::divider(s.groups * p.filter_tiles.divisor);
  ai3::cuda::launch(a, ai3::dtype_name(wide ? "wide" : "few", a->dtype).c_str(),
                    {ceil_div(p.pixels, tile_pixels) * p.tiles.divisor}, kThreads, 0, p);
}

double cost(const ai3_args* a) {
  const Sizes s(a);
  const int64_t* out = a->output.size;
  const auto elements = [](const ai3_tensor& t) {
    return static_cast<double>(t.size[0]) * static_cast<double>(t.size[1] * t.size[2] * t.size[3]);
  };
  const double bytes = (elements(a->input) + elements(a->output)) * static_cast<double>(ai3::dtype_bytes(a->dtype));
  if (ai3::is_depthwise(a)) return 2000 + bytes / 2500;
  // A multiprocessor works on one tile as fast as on its share of several.
  constexpr double kTiles = 132, kRate = 25000;
  const double tile_pixels = kThreads * kRows * kColumns / static_cast<double>(s.tile_filters);
  const double pixels = static_cast<double>(out[0]) * static_cast<double>(out[2] * out[3]);
  const double tiles =
      std::max(kTiles, pixels / tile_pixels * static_cast<double>(s.groups * s.padded_filters / s.tile_filters));
  const double flops = 2 * tiles * kThreads * kRows * kColumns * static_cast<double>(s.padded_depth);
  return 2000 + flops / kRate * (a->dtype == AI3_FLOAT64 ? 2 : 1) + bytes / 4000;
}

const ai3_kernel kernel = {
    .abi_version = AI3_ABI_VERSION,
    .operation = "conv2d",
    .algorithm = "direct",
    .version = 1,
    .flags = AI3_NCHW | AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_OUTPUT | AI3_STRIDED_INPUT | AI3_RESIDUAL_IN_PLACE,
    .supports = supports,
    .cost = cost,
    .packed_bytes = packed_bytes,
    .pack = pack,
    .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }

#endif
