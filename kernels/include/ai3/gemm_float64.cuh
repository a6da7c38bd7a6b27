// A convolution of doubles as an implicit GEMM by ordinary multiply-adds: tiles of 64 pixels by 64 output channels, 4x4
// sums a thread. The weights are read as they lie.
// Source: Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", arXiv 1410.0759.
#pragma once

#include <ai3/gemm_tile.cuh>

#ifdef __CUDACC__

namespace ai3 {

__device__ __forceinline__ void implicit_gemm_float64(const GemmParams& p) {
  constexpr int kTile = 64, kDepth = 16;
  __shared__ double inputs[kDepth][kTile + 1], weights[kDepth][kTile + 1];
  const int thread = threadIdx.x, column_tile = blockIdx.x % p.column_tiles, tile = blockIdx.x / p.column_tiles;
  const int group = tile % p.groups, first_row = tile / p.groups * kTile, first_column = column_tile * kTile;
  const int taps = p.kernel_h * p.kernel_w, depth = p.channels * taps;
  const double* const weight = static_cast<const double*>(p.packed) + int64_t(group) * p.columns * depth;
  GemmRow<double> row;
  row.start(p, first_row + thread % kTile, group);

  double sums[4][4] = {};
  for (int block = 0; block < depth; block += kDepth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = thread / kTile + i * 4, at = block + k, channel = at / taps, tap = at - channel * taps;
      const int tap_h = tap / p.kernel_w, down = tap_h * p.dilation_h,
                right = (tap - tap_h * p.kernel_w) * p.dilation_w;
      double x =
          at < depth && row.inside(p, down, right) ? row.from[(down * p.width + right) * p.in_pixel + channel] : 0.0;
      if (p.prologue_scale != nullptr && at < depth) {
        const int of = group * p.channels + channel;
        x = x * static_cast<const double*>(p.prologue_scale)[of] + static_cast<const double*>(p.prologue_shift)[of];
        x = x < p.prologue_low ? p.prologue_low : x;
      }
      inputs[k][thread % kTile] = x;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = thread % kDepth, column = thread / kDepth + i * 16;
      weights[k][column] = block + k < depth && first_column + column < p.columns
                               ? weight[int64_t(first_column + column) * depth + block + k]
                               : 0.0;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      double x[4], w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = inputs[k][thread / 16 + i * 16], w[i] = weights[k][thread % 16 + i * 16];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += x[i] * w[j];
      }
    }
    __syncthreads();
  }

  // Through shared memory, so that the activations are not unrolled.
  static_assert(kDepth * (kTile + 1) >= 4 * 256, "holds a row of sums of each thread");
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    double* const mine = &inputs[0][0] + thread;
#pragma unroll
    for (int j = 0; j < 4; ++j) mine[j * 256] = sums[i][j];
    const int at = first_row + thread / 16 + i * 16;
#pragma unroll 1
    for (int j = 0; j < 4; ++j) {
      const int column = first_column + thread % 16 + j * 16, channel = group * p.columns + column;
      if (at >= p.rows || column >= p.columns) continue;
      const int64_t to = at * p.out_pixel + channel;
      double x = mine[j * 256];
      if (p.bias) x += static_cast<const double*>(p.bias)[channel];
      if (p.residual) x += static_cast<const double*>(p.residual)[to];
      static_cast<double*>(p.output)[to] = activate(x, p.activation);
    }
  }
}

#if AI3_HAS_PART(AI3_PART_FLOAT64)
AI3_KERNEL(256, gemm_float64, ai3::GemmParams) { ai3::implicit_gemm_float64(p); }
#endif

}  // namespace ai3

#endif
