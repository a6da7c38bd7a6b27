// What the pooling algorithms on a GPU share. A thread reduces the window of one output pixel, for 16 bytes of channels
// where they are innermost; windows of many pixels are reduced by a warp or a block each.
//
// A Pool is made from the parameters, and describes an output's window: rows(p), columns(q) and divisor<S>(p, q), with
// kMax for a maximum, where the divisor is not asked for.
#pragma once

#include <ai3/window.cuh>

namespace ai3 {

constexpr int kLargeWindow = 32;  // pixels from which on several threads share a window

struct PoolParams {
  const void* in;
  void* out;
  Strides in_stride, out_stride;
  int32_t images, channels, height, width, out_height, out_width;
  int32_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_bottom, pad_left, pad_right;
  int32_t count_include_pad;
  int64_t divisor_override;                // 0: none
  Tiles tiles;                             // pool_windows: one output pixel a block of it
  Divider out_columns, out_rows, vectors;  // for the walks without tiles
  int32_t slices;                          // threads that share a window
};

#ifdef __CUDACC__

// The input rows (or columns) begin, begin + step, ... below end.
struct Span {
  int begin, end, step;
};

// A NaN stays one.
template <bool kMax, typename S>
__device__ __forceinline__ S combine(S a, S b) {
  if (kMax) return b > a || b != b ? b : a;
  return a + b;
}

template <bool kMax, typename S>
__device__ __forceinline__ S pool_identity() {
  return kMax ? -S(__int_as_float(0x7f800000)) : S(0);
}

template <bool kMax, int L, typename T>
__device__ __forceinline__ void combine_lanes(Accumulator<T> (&total)[L], const T* p) {
  const Lanes<T, L> x = load_lanes<L>(p);
#pragma unroll
  for (int i = 0; i < L; ++i) total[i] = combine<kMax>(total[i], widen(x.at[i]));
}

// Rows are reduced first, then their results: the rounding error of a mean stays small. K: the most taps of a row and
// of a column, or 0 for any.
template <bool kMax, int K, int L, typename T>
__device__ __forceinline__ void reduce_window(Accumulator<T> (&total)[L], const T* image, Strides stride, Span rows,
                                              Span columns) {
  using S = Accumulator<T>;
#pragma unroll
  for (int i = 0; i < L; ++i) total[i] = pool_identity<kMax, S>();
  const auto row = [&](int h) {
    S partial[L];
#pragma unroll
    for (int i = 0; i < L; ++i) partial[i] = pool_identity<kMax, S>();
    const T* line = image + h * stride.row;
    if constexpr (K > 0) {
#pragma unroll
      for (int s = 0; s < K; ++s) {
        const int w = columns.begin + s * columns.step;
        if (w < columns.end) combine_lanes<kMax>(partial, line + w * stride.column);
      }
    } else {
      for (int w = columns.begin; w < columns.end; w += columns.step)
        combine_lanes<kMax>(partial, line + w * stride.column);
    }
#pragma unroll
    for (int i = 0; i < L; ++i) total[i] = combine<kMax>(total[i], partial[i]);
  };
  if constexpr (K > 0) {
#pragma unroll
    for (int r = 0; r < K; ++r) {
      if (rows.begin + r * rows.step < rows.end) row(rows.begin + r * rows.step);
    }
  } else {
    for (int h = rows.begin; h < rows.end; h += rows.step) row(h);
  }
}

// In a word.
template <typename T>
constexpr uint32_t kMinusInfinity = 0xff800000;
template <>
constexpr uint32_t kMinusInfinity<Half> = 0xfc00fc00;
template <>
constexpr uint32_t kMinusInfinity<BFloat16> = 0xff80ff80;

// The maximum of a window, of 16 bytes of channels, as they are: nothing is converted.
template <int K, typename T>
__device__ __forceinline__ uint4 max_of_window(const T* image, Strides stride, Span rows, Span columns) {
  constexpr uint32_t kLowest = kMinusInfinity<T>;
  uint4 best = {kLowest, kLowest, kLowest, kLowest};
  const auto add = [&](int h, int w) {
    const uint4 x = *reinterpret_cast<const uint4*>(image + h * stride.row + w * stride.column);
    best = {max_word<T>(best.x, x.x), max_word<T>(best.y, x.y), max_word<T>(best.z, x.z), max_word<T>(best.w, x.w)};
  };
  if (rows.begin >= rows.end || columns.begin >= columns.end) return best;
  if constexpr (K > 0) {
    // Taps outside count as the first one again, so that all are read at once.
#pragma unroll
    for (int r = 0; r < K; ++r) {
      const int h = rows.begin + (rows.begin + r * rows.step < rows.end ? r * rows.step : 0);
#pragma unroll
      for (int s = 0; s < K; ++s)
        add(h, columns.begin + (columns.begin + s * columns.step < columns.end ? s * columns.step : 0));
    }
  } else {
    for (int h = rows.begin; h < rows.end; h += rows.step) {
#pragma unroll 4
      for (int w = columns.begin; w < columns.end; w += columns.step) add(h, w);
    }
  }
  return best;
}

template <typename Pool, int L, typename T>
__device__ __forceinline__ void write_pooled(const Pool& pool, Accumulator<T> (&total)[L], T* out, int p, int q) {
  if constexpr (!Pool::kMax) {
    const auto divisor = pool.template divisor<Accumulator<T>>(p, q);
#pragma unroll
    for (int i = 0; i < L; ++i) total[i] /= divisor;
  }
  store_lanes(out, total);
}

// Images with their channels innermost: a thread an output pixel and L channels.
template <typename Pool, int K, int L, typename T>
__device__ __forceinline__ void pool_windows(const PoolParams& p) {
  TilePlace place;
  if (!place.find(p.tiles)) return;
  const Pool pool{p};
  const Span rows = pool.rows(place.row_block), columns = pool.columns(place.column_block);
  for (int n = blockIdx.y; n < p.images; n += gridDim.y) {
    const T* in = static_cast<const T*>(p.in) + n * p.in_stride.image + place.vector * L * p.in_stride.channel;
    T* out = static_cast<T*>(p.out) + n * p.out_stride.image + place.vector * L * p.out_stride.channel +
             place.row_block * p.out_stride.row + place.column_block * p.out_stride.column;
    if constexpr (Pool::kMax && sizeof(T) < 8 && L * sizeof(T) == 16) {
      *reinterpret_cast<uint4*>(out) = max_of_window<K>(in, p.in_stride, rows, columns);
    } else {
      Accumulator<T> total[L];
      reduce_window<Pool::kMax, K>(total, in, p.in_stride, rows, columns);
      write_pooled(pool, total, out, place.row_block, place.column_block);
    }
  }
}

// Images with their pixels innermost: threads go along the rows of outputs.
template <typename Pool, int K, typename T>
__device__ __forceinline__ void pool_planes(const PoolParams& p) {
  const Pool pool{p};
  unsigned column, row;
  const unsigned channel =
      p.out_rows.divide(p.out_columns.divide(blockIdx.x * kWindowThreads + threadIdx.x, column), row);
  if (channel >= p.channels) return;
  const Span rows = pool.rows(row), columns = pool.columns(column);
  for (int n = blockIdx.y; n < p.images; n += gridDim.y) {
    const T* in = static_cast<const T*>(p.in) + n * p.in_stride.image + channel * p.in_stride.channel;
    Accumulator<T> total[1];
    reduce_window<Pool::kMax, K>(total, in, p.in_stride, rows, columns);
    T* out = static_cast<T*>(p.out) + n * p.out_stride.image + channel * p.out_stride.channel + row * p.out_stride.row +
             column * p.out_stride.column;
    write_pooled(pool, total, out, row, column);
  }
}

// The pixels of a window from `first` on, every `step`-th in the order of its rows.
template <bool kMax, int L, typename T>
__device__ __forceinline__ void reduce_slice(Accumulator<T> (&total)[L], const T* image, Strides stride, Span rows,
                                             Span columns, int first, int step) {
#pragma unroll
  for (int i = 0; i < L; ++i) total[i] = pool_identity<kMax, Accumulator<T>>();
  const int width = max(0, (columns.end - columns.begin + columns.step - 1) / columns.step);
  if (width == 0) return;
  if (width * stride.column == stride.row && rows.step == 1) {
    // Whole rows: the pixels are all as far apart.
    const T* begin = image + rows.begin * stride.row;
    const int count = (rows.end - rows.begin) * width;
#pragma unroll 8
    for (int i = first; i < count; i += step) combine_lanes<kMax>(total, begin + i * stride.column);
    return;
  }
  int row = first / width, column = first % width;
  const int row_step = step / width, column_step = step % width;
#pragma unroll 4
  for (int h = rows.begin + row * rows.step; h < rows.end; h = rows.begin + row * rows.step) {
    const int w = columns.begin + column * columns.step;
    combine_lanes<kMax>(total, image + h * stride.row + w * stride.column);
    column += column_step, row += row_step;
    if (column >= width) column -= width, ++row;
  }
}

// Large windows with the channels innermost: a block takes a pixel and some vectors of channels, p.slices threads each.
template <typename Pool, int L, typename T>
__device__ __forceinline__ void pool_large(const PoolParams& p) {
  using S = Accumulator<T>;
  __shared__ S sums[kWindowThreads * L];
  const Pool pool{p};
  const int lanes = p.tiles.lanes.divisor;
  unsigned lane, channel_tile, column, row;
  const int slice = p.tiles.lanes.divide(threadIdx.x, lane);
  const unsigned pixel = p.tiles.channel_tiles.divide(blockIdx.x, channel_tile);
  row = p.out_columns.divide(pixel, column);
  const int vector = channel_tile * lanes + lane;
  const bool used = slice < p.slices && vector < p.tiles.vectors;
  for (int n = blockIdx.y; n < p.images; n += gridDim.y) {
    const T* in = static_cast<const T*>(p.in) + n * p.in_stride.image + vector * L * p.in_stride.channel;
    S total[L];
    if (used) {
      reduce_slice<Pool::kMax>(total, in, p.in_stride, pool.rows(row), pool.columns(column), slice, p.slices);
#pragma unroll
      for (int i = 0; i < L; ++i) sums[(slice * L + i) * lanes + lane] = total[i];
    }
    for (int half = p.slices / 2; half > 0; half /= 2) {
      __syncthreads();
      if (used && slice < half) {
#pragma unroll
        for (int i = 0; i < L; ++i) {
          total[i] = combine<Pool::kMax>(total[i], sums[((slice + half) * L + i) * lanes + lane]);
          sums[(slice * L + i) * lanes + lane] = total[i];
        }
      }
    }
    if (used && slice == 0) {
      T* out = static_cast<T*>(p.out) + n * p.out_stride.image + vector * L * p.out_stride.channel +
               row * p.out_stride.row + column * p.out_stride.column;
      write_pooled(pool, total, out, row, column);
    }
    __syncthreads();
  }
}

// Large windows with the pixels innermost: a warp takes an output, or a block where p.slices says so.
template <typename Pool, typename T>
__device__ __forceinline__ void pool_large_planes(const PoolParams& p) {
  using S = Accumulator<T>;
  constexpr int kWarp = 32, kWarps = kWindowThreads / kWarp;
  __shared__ S sums[kWarps];
  const Pool pool{p};
  const unsigned slice = threadIdx.x % p.slices,
                 output = blockIdx.x * (kWindowThreads / p.slices) + threadIdx.x / p.slices;
  unsigned column, row;
  const unsigned channel = p.out_rows.divide(p.out_columns.divide(output, column), row);
  const bool used = channel < p.channels;
  for (int n = blockIdx.y; n < p.images; n += gridDim.y) {
    S total[1] = {pool_identity<Pool::kMax, S>()};
    if (used) {
      const T* in = static_cast<const T*>(p.in) + n * p.in_stride.image + channel * p.in_stride.channel;
      reduce_slice<Pool::kMax>(total, in, p.in_stride, pool.rows(row), pool.columns(column), slice, p.slices);
    }
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      total[0] = combine<Pool::kMax>(total[0], __shfl_xor_sync(~0u, total[0], distance));
    if (p.slices > kWarp) {
      if (slice % kWarp == 0) sums[slice / kWarp] = total[0];
      __syncthreads();
#pragma unroll
      for (int i = 1; i < kWarps; ++i) total[0] = combine<Pool::kMax>(total[0], sums[i]);
      __syncthreads();
    }
    if (used && slice == 0) {
      T* out = static_cast<T*>(p.out) + n * p.out_stride.image + channel * p.out_stride.channel +
               row * p.out_stride.row + column * p.out_stride.column;
      write_pooled(pool, total, out, row, column);
    }
  }
}

#define AI3_POOL_KERNEL(name, suffix, ...) \
  AI3_KERNEL_BLOCKS(ai3::kWindowThreads, 4, name##_##suffix, ai3::PoolParams) { ai3::__VA_ARGS__(p); }
#define AI3_POOL_OF(Pool, suffix, T)                                          \
  AI3_POOL_KERNEL(vectors, suffix, pool_windows<Pool, 0, ai3::kLanes<T>, T>)  \
  AI3_POOL_KERNEL(channels, suffix, pool_windows<Pool, 0, 1, T>)              \
  AI3_POOL_KERNEL(planes, suffix, pool_planes<Pool, 0, T>)                    \
  AI3_POOL_KERNEL(large_vectors, suffix, pool_large<Pool, ai3::kLanes<T>, T>) \
  AI3_POOL_KERNEL(large_channels, suffix, pool_large<Pool, 1, T>)             \
  AI3_POOL_KERNEL(large_planes, suffix, pool_large_planes<Pool, T>)
#define AI3_POOL_3X3_OF(Pool, suffix, T)                                         \
  AI3_POOL_KERNEL(vectors_3x3, suffix, pool_windows<Pool, 3, ai3::kLanes<T>, T>) \
  AI3_POOL_KERNEL(planes_3x3, suffix, pool_planes<Pool, 3, T>)

#else

inline const char* pool_supports(const ai3_args* a) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (a->dtype == AI3_OTHER) return "needs a floating-point dtype";
  const auto pixels = [](const ai3_tensor& t) { return t.size[1] * t.size[2] * t.size[3]; };
  return pixels(a->input) < kLimit && pixels(a->output) < kLimit ? nullptr : "needs images of fewer than 2^31 elements";
}

// Nanoseconds: the input and the output once.
inline double pool_cost(const ai3_args* a) {
  const auto elements = [](const ai3_tensor& t) {
    return static_cast<double>(t.size[0]) * static_cast<double>(t.size[1] * t.size[2] * t.size[3]);
  };
  return 2000 + (elements(a->input) + elements(a->output)) * static_cast<double>(dtype_bytes(a->dtype)) / 3500;
}

// `window`: the pixels of the largest one.
inline void pool_run(const ai3_args* a, int64_t window, bool is_3x3) {
  constexpr int64_t kWarp = 32, kFewBlocks = 264, kBlockWindow = 1024;
  const int64_t *in = a->input.size, *out = a->output.size;
  PoolParams p{};
  p.in = a->input.data, p.out = a->output.data;
  p.in_stride = strides_of(a->input), p.out_stride = strides_of(a->output);
  p.images = static_cast<int32_t>(in[0]), p.channels = static_cast<int32_t>(in[1]);
  p.height = static_cast<int32_t>(in[2]), p.width = static_cast<int32_t>(in[3]);
  p.out_height = static_cast<int32_t>(out[2]), p.out_width = static_cast<int32_t>(out[3]);
  p.kernel_h = static_cast<int32_t>(a->kernel_h), p.kernel_w = static_cast<int32_t>(a->kernel_w);
  p.stride_h = static_cast<int32_t>(a->stride_h), p.stride_w = static_cast<int32_t>(a->stride_w);
  p.dilation_h = static_cast<int32_t>(a->dilation_h), p.dilation_w = static_cast<int32_t>(a->dilation_w);
  p.pad_top = static_cast<int32_t>(a->pad_top), p.pad_bottom = static_cast<int32_t>(a->pad_bottom);
  p.pad_left = static_cast<int32_t>(a->pad_left), p.pad_right = static_cast<int32_t>(a->pad_right);
  p.count_include_pad = a->count_include_pad;
  p.divisor_override = a->divisor_override;
  p.out_columns = divider(out[3]), p.out_rows = divider(out[2]);
  const bool channels_inside = a->input.stride[1] == 1 && a->output.stride[1] == 1 && in[1] > 1;
  const int64_t lanes = std::min(vector_lanes(a->dtype, a->input), vector_lanes(a->dtype, a->output));
  const int64_t vectors = in[1] / lanes, images = std::min<int64_t>(in[0], 65535), pixels = out[2] * out[3];
  const char* kind = lanes > 1 ? "vectors" : "channels";
  const auto launch = [&](const std::string& name, cuda::Grid grid, int64_t threads) {
    cuda::launch(a, dtype_name(name.c_str(), a->dtype).c_str(), grid, static_cast<unsigned>(threads), 0, p);
  };
  if (window < kLargeWindow) {
    if (!channels_inside)
      return launch(is_3x3 ? "planes_3x3" : "planes", {cuda::ceil_div(in[1] * pixels, kWindowThreads), images},
                    kWindowThreads);
    p.tiles = make_tiles(in[0], vectors, out[2], out[3]);
    return launch(is_3x3 && lanes > 1 ? "vectors_3x3" : kind, tile_grid(p.tiles, in[0]), p.tiles.threads);
  }
  if (!channels_inside) {
    p.slices = static_cast<int32_t>(window < kBlockWindow ? kWarp : kWindowThreads);
    return launch("large_planes", {cuda::ceil_div(in[1] * pixels, kWindowThreads / p.slices), images}, kWindowThreads);
  }
  // Narrow enough for a block for every multiprocessor.
  int64_t width = std::min(kWarp, vectors);
  while (width > 1 && in[0] * pixels * cuda::ceil_div(vectors, width) < kFewBlocks) width /= 2;
  p.slices = 1;
  while (p.slices * 2 * width <= kWindowThreads && p.slices * 2 <= window) p.slices *= 2;
  p.tiles.lanes = divider(width), p.tiles.channel_tiles = divider(cuda::ceil_div(vectors, width));
  p.tiles.vectors = static_cast<int32_t>(vectors);
  launch(std::string("large_") + kind, {pixels * p.tiles.channel_tiles.divisor, images},
         cuda::ceil_div(p.slices * width, kWarp) * kWarp);
}

#endif

}  // namespace ai3
