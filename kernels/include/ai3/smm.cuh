// SMM-Conv on a GPU: the copies of the input that blocks of threads multiply by the weights' scalars.
// Source: Ofir and Ben-Artzi, "SMM-Conv: Scalar Matrix Multiplication with Zero Packing for Accelerated Convolution",
// CVPR Workshops 2022, arXiv 2411.15659. Extended to strides, dilation and groups.
//
// A block of threads takes a tile of output pixels and some filters. Of some input channels at a time it copies what
// the tile reads to shared memory, with the padding's zeros, its rows and columns ordered by their remainders modulo
// the strides: what one tap reads is then the same copy, begun some elements later. Each weight times that slice is
// added to the outputs, which stay in registers. Where a tile has few pixels, parts of the block share the channels.
#pragma once

#include <ai3/window.cuh>

namespace ai3 {

constexpr int kSmmThreads = 256, kSmmPixels = 4;  // pixels of a thread
constexpr int kSmmFilterBytes = 64;               // filters of a block of threads, as bytes of their sums
constexpr int kSmmFewFilters = 4;                 // of one that has no more

struct SmmParams {
  const void *in, *weight, *bias,
      *residual;  // weight: [group][filter block][channel][tap][filter]; bias, residual: or null
  void* out;
  Strides in_stride, out_stride;  // the residual's are the output's
  int32_t height, width, out_height, out_width, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int32_t kernel_w, taps, channels, filters, activation;  // channels and filters of a group
  int32_t tile_rows, tile_columns, pixel_threads, parts;
  int32_t phase_rows, phase_columns, plane;  // plane: elements of one channel's copy
  int32_t stage_channels;
  // Of what a block takes, the innermost first; of an element of a copy; of a pixel of a tile.
  Divider filter_blocks, groups, column_tiles, row_tiles;
  Divider by_phase_columns, column_phases, by_phase_rows, by_tile_columns;
};

struct SmmPackParams {
  const void* weight;
  void* packed;
  int64_t count;
  int32_t channels, filters, taps, block, blocks;
};

#ifdef __CUDACC__

template <typename T>
__device__ __forceinline__ void smm_pack(const SmmPackParams& p) {
  const int64_t i = int64_t(blockIdx.x) * kSmmThreads + threadIdx.x;
  if (i >= p.count) return;
  const int filter = int(i % p.block), tap = int(i / p.block % p.taps),
            channel = int(i / p.block / p.taps % p.channels);
  const int64_t block = i / p.block / p.taps / p.channels, group = block / p.blocks;
  const int64_t k = block % p.blocks * p.block + filter;
  const int64_t from = ((group * p.filters + k) * p.channels + channel) * p.taps + tap;
  static_cast<T*>(p.packed)[i] = k < p.filters ? static_cast<const T*>(p.weight)[from] : narrow<T>(0);
}

// The copies of `channels` channels from `in` on.
template <typename T>
__device__ __forceinline__ void smm_copy(const SmmParams& p, const T* in, int channels, int top, int left,
                                         Accumulator<T>* to) {
  for (int e = threadIdx.x; e < p.plane; e += kSmmThreads) {
    unsigned column, column_phase, row;
    const unsigned row_phase =
        p.by_phase_rows.divide(p.column_phases.divide(p.by_phase_columns.divide(e, column), column_phase), row);
    const int h = top + int(row) * p.stride_h + int(row_phase), w = left + int(column) * p.stride_w + int(column_phase);
    const bool inside = unsigned(h) < unsigned(p.height) && unsigned(w) < unsigned(p.width);
    const T* from = in + h * p.in_stride.row + w * p.in_stride.column;
#pragma unroll 4
    for (int c = 0; c < channels; ++c)
      to[c * p.plane + e] = inside ? widen(from[c * p.in_stride.channel]) : Accumulator<T>(0);
  }
}

// Onto the sums of the first part, those of the others.
template <int Filters, typename S>
__device__ __forceinline__ void smm_add_parts(const SmmParams& p, S (&sum)[Filters][kSmmPixels], int part, int thread,
                                              S* shared) {
  for (int half = p.parts / 2; half > 0; half /= 2) {
    __syncthreads();
    S* at = shared + ((part - half) * Filters * kSmmPixels) * p.pixel_threads + thread;
    if (part >= half && part < 2 * half) {
#pragma unroll
      for (int i = 0; i < Filters * kSmmPixels; ++i) at[i * p.pixel_threads] = sum[i / kSmmPixels][i % kSmmPixels];
    }
    __syncthreads();
    at += half * Filters * kSmmPixels * p.pixel_threads;
    if (part < half) {
#pragma unroll
      for (int i = 0; i < Filters * kSmmPixels; ++i) sum[i / kSmmPixels][i % kSmmPixels] += at[i * p.pixel_threads];
    }
  }
}

template <int Filters, typename T>
__device__ __forceinline__ void smm(const SmmParams& p) {
  using S = Accumulator<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  S* const weights = reinterpret_cast<S*>(shared);  // [channel][tap][filter]
  S* const copies = weights + p.stage_channels * p.taps * Filters;
  int* const tap_offsets = reinterpret_cast<int*>(copies + p.stage_channels * p.plane);

  unsigned block, group, column_tile, row_tile;
  const int64_t image = p.row_tiles.divide(
      p.column_tiles.divide(p.groups.divide(p.filter_blocks.divide(blockIdx.x, block), group), column_tile), row_tile);
  const int first_row = row_tile * p.tile_rows, first_column = column_tile * p.tile_columns;
  const int row_pitch = int(p.column_phases.divisor) * p.phase_columns;
  for (int tap = threadIdx.x; tap < p.taps; tap += kSmmThreads) {
    const int h = tap / p.kernel_w * p.dilation_h, w = tap % p.kernel_w * p.dilation_w;
    tap_offsets[tap] = (h % p.stride_h * p.phase_rows + h / p.stride_h) * row_pitch + w % p.stride_w * p.phase_columns +
                       w / p.stride_w;
  }
  const int thread = int(threadIdx.x) % p.pixel_threads, part = int(threadIdx.x) / p.pixel_threads;
  int pixel[kSmmPixels];
  S sum[Filters][kSmmPixels] = {};
#pragma unroll
  for (int j = 0; j < kSmmPixels; ++j) {
    unsigned column;
    const int row = int(p.by_tile_columns.divide(thread + j * p.pixel_threads, column));
    pixel[j] = row < p.tile_rows ? row * row_pitch + int(column) : 0;
  }
  const T* in =
      static_cast<const T*>(p.in) + image * p.in_stride.image + int64_t(group) * p.channels * p.in_stride.channel;
  const T* weight = static_cast<const T*>(p.weight) +
                    (int64_t(group) * p.filter_blocks.divisor + block) * p.channels * p.taps * Filters;
  for (int c = 0; c < p.channels; c += p.stage_channels) {
    const int channels = min(p.stage_channels, p.channels - c);
    __syncthreads();
    for (int i = threadIdx.x; i < channels * p.taps * Filters; i += kSmmThreads)
      weights[i] = widen(weight[int64_t(c) * p.taps * Filters + i]);
    smm_copy(p, in + c * p.in_stride.channel, channels, first_row * p.stride_h - p.pad_top,
             first_column * p.stride_w - p.pad_left, copies);
    __syncthreads();
    if (part >= p.parts) continue;
    for (int i = part; i < channels; i += p.parts) {
      const S* copy = copies + i * p.plane;
      const S* scalars = weights + i * p.taps * Filters;
#pragma unroll 1
      for (int tap = 0; tap < p.taps; ++tap, scalars += Filters) {
        const S* slice = copy + tap_offsets[tap];
        S x[kSmmPixels], y[Filters];
#pragma unroll
        for (int j = 0; j < kSmmPixels; ++j) x[j] = slice[pixel[j]];
#pragma unroll
        for (int k = 0; k < Filters; ++k) y[k] = scalars[k];
#pragma unroll
        for (int k = 0; k < Filters; ++k) {
#pragma unroll
          for (int j = 0; j < kSmmPixels; ++j) sum[k][j] += y[k] * x[j];
        }
      }
    }
  }
  smm_add_parts<Filters>(p, sum, part, thread, reinterpret_cast<S*>(shared));
  if (part > 0) return;

  const int first_filter = block * Filters;
  int at[kSmmPixels];  // the outputs are fewer than 2^31
  const int channel = int(p.out_stride.channel);
  bool inside[kSmmPixels];
#pragma unroll
  for (int j = 0; j < kSmmPixels; ++j) {
    unsigned column;
    const int row = int(p.by_tile_columns.divide(thread + j * p.pixel_threads, column));
    const int out_row = first_row + row, out_column = first_column + int(column);
    inside[j] = row < p.tile_rows && out_row < p.out_height && out_column < p.out_width;
    at[j] = int(image * p.out_stride.image + (int64_t(group) * p.filters + first_filter) * p.out_stride.channel +
                out_row * p.out_stride.row + out_column * p.out_stride.column);
  }
  const int filter = int(group) * p.filters + first_filter;
#pragma unroll
  for (int k = 0; k < Filters; ++k) {
    if (first_filter + k >= p.filters) continue;
    const S bias = p.bias == nullptr ? S(0) : widen(static_cast<const T*>(p.bias)[filter + k]);
#pragma unroll
    for (int j = 0; j < kSmmPixels; ++j) {
      sum[k][j] += bias;
      if (p.residual != nullptr && inside[j])
        sum[k][j] += widen(static_cast<const T*>(p.residual)[at[j] + k * channel]);
    }
  }
  activate_all(sum, p.activation);
#pragma unroll
  for (int k = 0; k < Filters; ++k) {
    if (first_filter + k >= p.filters) continue;
#pragma unroll
    for (int j = 0; j < kSmmPixels; ++j) {
      if (inside[j]) static_cast<T*>(p.out)[at[j] + k * channel] = narrow<T>(sum[k][j]);
    }
  }
}

#endif

}  // namespace ai3
