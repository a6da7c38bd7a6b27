// The tile of gemm_tile.cuh for products of few rows, which take as long as their weights take to be read: those of a
// block of depth come as one run of memory, and the depth is shared out to warps, none of which waits for another, and
// to the blocks of a cluster (sm_90a). The weights' columns are the rows of the instruction, of which it has more.
// Source: as gemm_tile.cuh.
#pragma once

#include <ai3/gemm_through.cuh>

#if AI3_WGMMA

namespace ai3 {

// The channel whose weights are this column of the packed ones.
template <typename T>
__device__ __forceinline__ int channel_of(int column) {
  constexpr int kCount = 16 / sizeof(T);
  const int in_run = column % (4 * kCount);
  return column - in_run + in_run % 8 / 2 * kCount + in_run / 8 * 2 + in_run % 2;
}

template <Math M>
__device__ __forceinline__ void implicit_gemm_thin(const GemmParams& p) {
  using T = typename ElementOf<M>::type;
  constexpr int kRows = kThinRows, kColumns = kThinColumns, kWarps = kThinWarps, kBlock = 128 / sizeof(T);
  constexpr int kStageBytes = (kColumns + kRows) * 128, kParts = kColumns / 16;
  static_assert(kParts * 2 == kWarps, "each warp ends one instruction's sums");

  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared), full = base + p.barriers, empty = full + p.slots * 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_column = blockIdx.x % p.column_tiles * kColumns, first_row = blockIdx.x / p.column_tiles * kRows;
  const int begin = int(int64_t(p.blocks) * blockIdx.z / gridDim.z);
  const int count = int(int64_t(p.blocks) * (blockIdx.z + 1) / gridDim.z) - begin;

  const int columns = min(kColumns, p.packed_columns - first_column);
  const char* const first_weights =
      static_cast<const char*>(p.packed) + (int64_t(begin) * p.packed_columns + first_column) * 128;
  if (threadIdx.x == kWarps * 32) {
    prefetch_tensor_map(p.tensor_map);
    for (int i = 0; i < p.slots; ++i) {
      init_barrier(full + i * 8, 1);
      init_barrier(empty + i * 8, 1);
    }
    fence_barriers();
    // Weights can come while the kernel before ends.
    for (int i = 0; i < min(count, p.slots); ++i) {
      prefetch_bulk(first_weights + int64_t(i) * p.packed_columns * 128, columns * 128);
    }
  }
  __syncthreads();

  wait_previous_grid();
  float sums[kParts][2][4] = {};
  if (warp == kWarps) {
    if (lane == 0) {
      const char* weights = first_weights;
      int slot = 0;
      uint32_t phase = 1;
      for (int i = 0; i < count; ++i) {
        const uint32_t at = base + slot * kStageBytes, barrier = full + slot * 8;
        wait_barrier(empty + slot * 8, phase);
        expect_bytes(barrier, (kRows + columns) * 128);
        copy_bulk(at, weights, columns * 128, barrier);
        copy_matrix(at + kColumns * 128, p.tensor_map, (begin + i) * kBlock, first_row, barrier);
        weights += int64_t(p.packed_columns) * 128;
        if (++slot == p.slots) slot = 0, phase ^= 1;
      }
    }
    __syncwarp();
  } else {
    for (int i = warp; i < count; i += kWarps) {
      const int slot = i % p.slots;
      const uint32_t weights = base + slot * kStageBytes, rows = weights + kColumns * 128;
      wait_barrier(full + slot * 8, i / p.slots % 2);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t b[4];
        load_matrices(b, swizzled(rows, lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        round_rows<M>(b);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          uint32_t a[4];
          load_matrices(a, swizzled(weights, part * 16 + lane % 16, 2 * k + lane / 16));
          mma<M>(sums[part][0], a, b[0], b[1]);
          mma<M>(sums[part][1], a, b[2], b[3]);
        }
      }
      __syncwarp();
      if (lane == 0) arrive(empty + slot * 8);
    }
  }

  // Each warp ends one instruction's sums: those of all warps, then those of all blocks of the cluster.
  auto* const exchange = reinterpret_cast<float4*>(shared);
  const auto place = [](int of_warp, int unit) { return (of_warp * kWarps + unit) * 32 + int(threadIdx.x) % 32; };
  __syncthreads();
  if (warp < kWarps) {
#pragma unroll
    for (int unit = 0; unit < kWarps; ++unit) {
      const float* s = sums[unit / 2][unit % 2];
      exchange[place(warp, unit)] = make_float4(s[0], s[1], s[2], s[3]);
    }
  }
  __syncthreads();
  float v[4] = {};
  const auto add = [&v](const float4& s) { v[0] += s.x, v[1] += s.y, v[2] += s.z, v[3] += s.w; };
  if (warp < kWarps) {
#pragma unroll
    for (int of_warp = 0; of_warp < kWarps; ++of_warp) add(exchange[place(of_warp, warp)]);
  }
  const bool ends = warp < kWarps && warp % gridDim.z == blockIdx.z;
  if (gridDim.z > 1) {
    if (warp < kWarps) exchange[place(0, warp)] = make_float4(v[0], v[1], v[2], v[3]);
    cluster_barrier();
    if (ends) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = 0;
      for (int rank = 0; rank < gridDim.z; ++rank) {
        add(load_of_block(shared_address(exchange + place(0, warp)), rank));
      }
    }
    cluster_barrier();  // the other blocks have read this one's sums
  }
  if (!ends) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + warp % 2 * 8 + lane % 4 * 2 + i % 2;
    const int channel = channel_of<T>(first_column + warp / 2 * 16 + i / 2 * 8 + lane / 4);
    if (row >= p.rows || channel >= p.columns) continue;
    const int64_t at = row * p.out_pixel + channel;
    float x = v[i];
    if (p.bias) x += widen(static_cast<const T*>(p.bias)[channel]);
    if (p.residual) x += widen(static_cast<const T*>(p.residual)[at]);
    static_cast<T*>(p.output)[at] = narrow<T>(activate(x, p.activation));
  }
}

}  // namespace ai3

#endif
