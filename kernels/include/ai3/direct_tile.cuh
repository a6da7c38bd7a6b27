// The tile of conv2d/direct.cu: output pixels by filters, whose sums stay in registers while the depth comes in steps,
// the next one's pixels and weights while one is multiplied. Source: as there.
#pragma once

#include <ai3/window.cuh>

namespace ai3::direct {

constexpr int kThreads = 128, kRows = 8, kColumns = 4;  // pixels and filters whose sums a thread holds
constexpr int kStepBytes = 64;                          // of the sums' type: the depth of a tile
constexpr int kWideFilters = 64, kFewFilters = 16;      // of a tile

constexpr int kVectorPixels = 1, kVectorFilters = 2;  // how outputs are written four at a time, if they are

struct Params {
  const void *in, *weight, *bias, *residual;  // bias, residual: or null
  void* out;
  Strides in_stride, out_stride;  // the residual's are the output's
  int64_t group_weights;          // elements of a packed group
  int32_t pixels, height, width, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int32_t depth, group_filters, padded_filters, activation;
  int32_t whole_steps, vector_steps;  // a thread's steps are channels of one tap; and can be read as vectors
  int32_t vector_outputs;
  Divider out_columns, out_rows, group_channels, kernel_w, filter_tiles, tiles;  // tiles: of filters of all groups
};

#ifdef __CUDACC__

template <int Filters, typename T>
struct Dense {
  using S = Accumulator<T>;
  static constexpr int kTileFilters = Filters, kTilePixels = kThreads * kRows * kColumns / Filters;
  static constexpr int kDepth = kStepBytes / sizeof(S);
  // A thread brings kSteps steps of kOwnPixels pixels, and kOwnWeights weights in vectors of kWeightLanes.
  static constexpr int kOwnPixels = kTilePixels > kThreads ? kTilePixels / kThreads : 1;
  static constexpr int kParts = kTilePixels < kThreads ? kThreads / kTilePixels : 1, kSteps = kDepth / kParts;
  static constexpr int kOwnWeights = kDepth * kTileFilters / kThreads;
  static constexpr int kWeightLanes = kOwnWeights < kLanes<T> ? kOwnWeights : kLanes<T>;
  static constexpr int kStepLanes = kSteps < kLanes<T> ? kSteps : kLanes<T>;

  struct Tile {
    S pixels[2][kDepth][kTilePixels], weights[2][kDepth][kTileFilters];
  };
  struct Pixel {
    const T* window;
    int top, left;
  };
  struct Loaded {
    T pixels[kOwnPixels][kSteps];
    Lanes<T, kWeightLanes> weights[kOwnWeights / kWeightLanes];
  };

  const Params& p;
  Tile& tile;
  Pixel pixel[kOwnPixels];
  const T* weight;
  int first_pixel, group, first_filter;

  __device__ __forceinline__ Dense(const Params& params, Tile& shared) : p(params), tile(shared) {
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
      to.weights[i] = load_lanes<kWeightLanes>(
          weight + (int64_t(chunk) * kDepth + at / kTileFilters) * p.padded_filters + at % kTileFilters);
    }
    const int step = chunk * kDepth + own_step();
#pragma unroll
    for (int i = 0; i < kOwnPixels; ++i) {
      T* x = to.pixels[i];
      if (p.whole_steps) {
        const T* from = address(pixel[i], step);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) x[j] = narrow<T>(0);
        if (from == nullptr) continue;
        if (p.vector_steps) {
#pragma unroll
          for (int j = 0; j < kSteps; j += kStepLanes) {
            const Lanes<T, kStepLanes> lanes = load_lanes<kStepLanes>(from + j);
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
          x[j] = from == nullptr ? narrow<T>(0) : *from;
        }
      }
    }
  }

  __device__ __forceinline__ void store(const Loaded& from, int buffer) {
#pragma unroll
    for (int i = 0; i < kOwnPixels; ++i) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) tile.pixels[buffer][own_step() + j][own_pixel(i)] = widen(from.pixels[i][j]);
    }
#pragma unroll
    for (int i = 0; i < kOwnWeights / kWeightLanes; ++i) {
      const int at = (i * kThreads + int(threadIdx.x)) * kWeightLanes;
      S* to = &tile.weights[buffer][at / kTileFilters][at % kTileFilters];
#pragma unroll
      for (int l = 0; l < kWeightLanes; ++l) to[l] = widen(from.weights[i].at[l]);
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
        const S b = first_filter + column + j < p.group_filters ? widen(bias[j]) : S(0);
#pragma unroll
        for (int i = 0; i < kRows; ++i) sum[i][j] += b;
      }
    }
    if (p.residual != nullptr) {
      each(sum, row, column, [&](int64_t at, auto& x) {
        constexpr int kCount = sizeof(x) / sizeof(S);
        const auto lanes = load_lanes<kCount>(static_cast<const T*>(p.residual) + at);
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] += widen(lanes.at[i]);
      });
    }
    activate_all(sum, p.activation);
    each(sum, row, column, [&](int64_t at, auto& x) { store_lanes(static_cast<T*>(p.out) + at, x); });
  }
};

template <int Filters, typename T>
__device__ __forceinline__ void compute(const Params& p) {
  __shared__ __align__(16) typename Dense<Filters, T>::Tile tile;
  Dense<Filters, T>(p, tile).run();
}

#endif

}  // namespace ai3::direct
