// Direct convolution: tiles of output pixels by filters, summed tap by tap from the image as it lies; no lowering.
// Source: Zhang, Franchetti and Low, "High Performance Zero-Memory Overhead Direct Convolutions", ICML 2018, arXiv
// 1809.10170, on tiles in shared memory. Depthwise convolutions take a second path, which runs along the channels.
#include <ai3/depthwise.cuh>

namespace {

constexpr int kThreads = 128, kRows = 8, kColumns = 4;  // pixels and filters whose sums a thread holds
constexpr int kStepBytes = 64;                          // of the sums' type: the depth of a tile
constexpr int kWideFilters = 64, kFewFilters = 16;      // of a tile

constexpr int kVectorPixels = 1, kVectorFilters = 2;  // how outputs are written four at a time, if they are

struct DenseParams {
  const void *in, *weight, *bias, *residual;  // bias, residual: or null
  void* out;
  ai3::Strides in_stride, out_stride;  // the residual's are the output's
  int64_t group_weights;               // elements of a packed group
  int32_t pixels, height, width, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int32_t depth, group_filters, padded_filters, activation;
  int32_t whole_steps, vector_steps;  // a thread's steps are channels of one tap; and can be read as vectors
  int32_t vector_outputs;
  ai3::Divider out_columns, out_rows, group_channels, kernel_w, filter_tiles, tiles;  // tiles: of filters of all groups
};

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

template <int Filters, typename T>
struct Dense {
  using S = ai3::Accumulator<T>;
  static constexpr int kTileFilters = Filters, kTilePixels = kThreads * kRows * kColumns / Filters;
  static constexpr int kDepth = kStepBytes / sizeof(S);
  // A thread brings kSteps steps of kOwnPixels pixels, and kOwnWeights weights in vectors of kWeightLanes.
  static constexpr int kOwnPixels = kTilePixels > kThreads ? kTilePixels / kThreads : 1;
  static constexpr int kParts = kTilePixels < kThreads ? kThreads / kTilePixels : 1, kSteps = kDepth / kParts;
  static constexpr int kOwnWeights = kDepth * kTileFilters / kThreads;
  static constexpr int kWeightLanes = kOwnWeights < ai3::kLanes<T> ? kOwnWeights : ai3::kLanes<T>;
  static constexpr int kStepLanes = kSteps < ai3::kLanes<T> ? kSteps : ai3::kLanes<T>;

  struct Tile {
    S pixels[2][kDepth][kTilePixels], weights[2][kDepth][kTileFilters];
  };
  struct Pixel {
    const T* window;
    int top, left;
  };
  struct Loaded {
    T pixels[kOwnPixels][kSteps];
    ai3::Lanes<T, kWeightLanes> weights[kOwnWeights / kWeightLanes];
  };

  const DenseParams& p;
  Tile& tile;
  Pixel pixel[kOwnPixels];
  const T* weight;
  int first_pixel, group, first_filter;

  __device__ __forceinline__ Dense(const DenseParams& params, Tile& shared) : p(params), tile(shared) {
    unsigned tile_index, filter_tile;
    first_pixel = int(p.tiles.divide(blockIdx.x, tile_index)) * kTilePixels;
    group = int(p.filter_tiles.divide(tile_index, filter_tile));
    first_filter = int(filter_tile) * kTileFilters;
    weight = static_cast<const T*>(p.weight) + group * p.group_weights + first_filter;
    const T* in = static_cast<const T*>(p.in) + int64_t(group) * p.group_channels.divisor * p.in_stride.channel;
#pragma unroll
    for (int i = 0; i < kOwnPixels; ++i) {
      const int at = first_pixel + own_pixel(i);
      unsigned q, row;
      const unsigned n = p.out_rows.divide(p.out_columns.divide(at, q), row);
      pixel[i].top = at < p.pixels ? int(row) * p.stride_h - p.pad_top : p.height + p.pad_top;
      pixel[i].left = int(q) * p.stride_w - p.pad_left;
      pixel[i].window =
          in + n * p.in_stride.image + pixel[i].top * p.in_stride.row + pixel[i].left * p.in_stride.column;
      // None of its taps is inside.
      if (at >= p.pixels) pixel[i].top = -(1 << 30);
    }
  }

  static __device__ __forceinline__ int own_pixel(int i) { return int(threadIdx.x) % kTilePixels + i * kThreads; }
  static __device__ __forceinline__ int own_step() { return int(threadIdx.x) / kTilePixels % kParts * kSteps; }

  // Where a step of a pixel is read, or null outside of the image.
  __device__ __forceinline__ const T* address(const Pixel& at, int step) const {
    unsigned channel, s;
    const int r = int(p.kernel_w.divide(p.group_channels.divide(step, channel), s));
    const int h = r * p.dilation_h, w = int(s) * p.dilation_w;
    const bool inside =
        step < p.depth && unsigned(at.top + h) < unsigned(p.height) && unsigned(at.left + w) < unsigned(p.width);
    return inside ? at.window + h * p.in_stride.row + w * p.in_stride.column + channel * p.in_stride.channel : nullptr;
  }

  __device__ __forceinline__ void load(Loaded& to, int chunk) const {
#pragma unroll
    for (int i = 0; i < kOwnWeights / kWeightLanes; ++i) {
      const int at = (i * kThreads + int(threadIdx.x)) * kWeightLanes;
      to.weights[i] = ai3::load_lanes<kWeightLanes>(
          weight + (int64_t(chunk) * kDepth + at / kTileFilters) * p.padded_filters + at % kTileFilters);
    }
    const int step = chunk * kDepth + own_step();
#pragma unroll
    for (int i = 0; i < kOwnPixels; ++i) {
      T* x = to.pixels[i];
      if (p.whole_steps) {
        const T* from = address(pixel[i], step);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) x[j] = ai3::narrow<T>(0);
        if (from == nullptr) continue;
        if (p.vector_steps) {
#pragma unroll
          for (int j = 0; j < kSteps; j += kStepLanes) {
            const ai3::Lanes<T, kStepLanes> lanes = ai3::load_lanes<kStepLanes>(from + j);
#pragma unroll
            for (int l = 0; l < kStepLanes; ++l) x[j + l] = lanes.at[l];
          }
        } else {
#pragma unroll
          for (int j = 0; j < kSteps; ++j) x[j] = from[j * p.in_stride.channel];
        }
      } else {
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          const T* from = address(pixel[i], step + j);
          x[j] = from == nullptr ? ai3::narrow<T>(0) : *from;
        }
      }
    }
  }

  __device__ __forceinline__ void store(const Loaded& from, int buffer) {
#pragma unroll
    for (int i = 0; i < kOwnPixels; ++i) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j)
        tile.pixels[buffer][own_step() + j][own_pixel(i)] = ai3::widen(from.pixels[i][j]);
    }
#pragma unroll
    for (int i = 0; i < kOwnWeights / kWeightLanes; ++i) {
      const int at = (i * kThreads + int(threadIdx.x)) * kWeightLanes;
      S* to = &tile.weights[buffer][at / kTileFilters][at % kTileFilters];
#pragma unroll
      for (int l = 0; l < kWeightLanes; ++l) to[l] = ai3::widen(from.weights[i].at[l]);
    }
  }

  __device__ __forceinline__ void multiply(S (&sum)[kRows][kColumns], int buffer, int row, int column) const {
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      S x[kRows], w[kColumns];
#pragma unroll
      for (int i = 0; i < kRows; ++i) x[i] = tile.pixels[buffer][k][row + i];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) w[j] = tile.weights[buffer][k][column + j];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] += x[i] * w[j];
      }
    }
  }

  // f(offset in the output, count constant, sums) for the outputs there are, four at a time where they are neighbours.
  template <typename F>
  __device__ __forceinline__ void each(S (&sum)[kRows][kColumns], int row, int column, const F& f) const {
    const int filter = first_filter + column;
    const int64_t channel = (int64_t(group) * p.group_filters + filter) * p.out_stride.channel;
    const auto offset = [&](int at) {
      unsigned q, line;
      const unsigned n = p.out_rows.divide(p.out_columns.divide(at, q), line);
      return n * p.out_stride.image + line * p.out_stride.row + q * p.out_stride.column + channel;
    };
    if (p.vector_outputs == kVectorPixels) {
#pragma unroll
      for (int i = 0; i < kRows; i += 4) {
        if (first_pixel + row + i >= p.pixels) continue;
        const int64_t at = offset(first_pixel + row + i);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (filter + j >= p.group_filters) continue;
          S x[4] = {sum[i][j], sum[i + 1][j], sum[i + 2][j], sum[i + 3][j]};
          f(at + j * p.out_stride.channel, x);
          sum[i][j] = x[0], sum[i + 1][j] = x[1], sum[i + 2][j] = x[2], sum[i + 3][j] = x[3];
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first_pixel + row + i >= p.pixels) continue;
      const int64_t at = offset(first_pixel + row + i);
      if (p.vector_outputs == kVectorFilters) {
        if (filter < p.group_filters) f(at, sum[i]);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (filter + j >= p.group_filters) continue;
        S x[1] = {sum[i][j]};
        f(at + j * p.out_stride.channel, x);
        sum[i][j] = x[0];
      }
    }
  }

  __device__ __forceinline__ void run() {
    const int row = int(threadIdx.x) / (kTileFilters / kColumns) * kRows;
    const int column = int(threadIdx.x) % (kTileFilters / kColumns) * kColumns;
    S sum[kRows][kColumns] = {};
    Loaded next;
    load(next, 0);
    store(next, 0);
    __syncthreads();
    const int chunks = (p.depth + kDepth - 1) / kDepth;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunk + 1 < chunks) load(next, chunk + 1);
      multiply(sum, chunk % 2, row, column);
      if (chunk + 1 < chunks) store(next, (chunk + 1) % 2);
      __syncthreads();
    }
    if (p.bias != nullptr) {
      const T* bias = static_cast<const T*>(p.bias) + group * p.group_filters + first_filter + column;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const S b = first_filter + column + j < p.group_filters ? ai3::widen(bias[j]) : S(0);
#pragma unroll
        for (int i = 0; i < kRows; ++i) sum[i][j] += b;
      }
    }
    if (p.residual != nullptr) {
      each(sum, row, column, [&](int64_t at, auto& x) {
        constexpr int kCount = sizeof(x) / sizeof(S);
        const auto lanes = ai3::load_lanes<kCount>(static_cast<const T*>(p.residual) + at);
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] += ai3::widen(lanes.at[i]);
      });
    }
    ai3::activate_all(sum, p.activation);
    each(sum, row, column, [&](int64_t at, auto& x) { ai3::store_lanes(static_cast<T*>(p.out) + at, x); });
  }
};

template <int Filters, typename T>
__device__ __forceinline__ void dense(const DenseParams& p) {
  __shared__ __align__(16) typename Dense<Filters, T>::Tile tile;
  Dense<Filters, T>(p, tile).run();
}

#define AI3_DIRECT(suffix, T)                                                               \
  AI3_KERNEL_BLOCKS(kThreads, 3, wide_##suffix, DenseParams) { dense<kWideFilters, T>(p); } \
  AI3_KERNEL_BLOCKS(kThreads, 2, few_##suffix, DenseParams) { dense<kFewFilters, T>(p); }   \
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
  DenseParams p{};
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
