// The tile of gemm_tile.cuh for matrices of so little depth that the residual and the output are most of what moves:
// the weights stay in shared memory, blocks compute tile after tile, and the tensor memory accelerator brings rows and
// residuals of the next ones and takes results away while one is computed (sm_90a). Two warpgroups take turns.
// Source: as gemm_tile.cuh; an end that goes through shared memory both ways is that of CUTLASS's epilogues for sm_90.
#pragma once

#include <ai3/gemm_tile.cuh>

namespace ai3 {

constexpr int kStreamTeams = 2, kStreamRows = 64;  // warpgroups; rows of a tile

// A stage is a tile's rows of the input, [block of depth][row][128 bytes], and its part of the output, [block of
// columns][row][128 bytes], where its residual is before.
struct GemmStreamParams : GemmParams {
  alignas(64) unsigned char residual_map[128];
  alignas(64) unsigned char output_map[128];
};

}  // namespace ai3

#ifdef __CUDACC__

#include <ai3/gemm_through.cuh>

#if AI3_WGMMA

namespace ai3 {

// The sums of one tile: rows of `stage` times the weights.
template <Math M, typename Layout, typename Sums>
__device__ __forceinline__ void multiply_stream(const GemmParams& p, Sums& sums, uint32_t stage, uint32_t weights) {
  constexpr int kRowBytes = kStreamRows * 128, kWeightBytes = Layout::kPartColumns * 128;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int block = 0; block < p.blocks; ++block, stage += kRowBytes, weights += kWeightBytes) {
    const uint64_t b = matrix_descriptor(weights);
    if constexpr (M == Math::kTf32) {
      constexpr int kAtOnce = kThroughAtOnce<Layout>;
      uint32_t a[2][kAtOnce][4];
#pragma unroll
      for (int k = 0; k < 4; k += kAtOnce) {
        multiply_through<M, Layout>(sums, a[k / kAtOnce % 2], stage, warp % 4 * 16 + lane % 16, b, k, block > 0,
                                    [](uint32_t (&of)[4], int) { round_rows<M>(of); });
      }
      wgmma_wait<0>();
    } else {
      const uint64_t a = matrix_descriptor(stage);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma<M, Layout::kPartColumns>(sums[0][0], a + k * 2, b + k * 2, (k | block) != 0);
      }
      wgmma_commit();
    }
  }
  wgmma_wait<0>();
}

// The end of a tile, in shared memory from its residual to its results.
template <typename T, typename Layout, typename Sums>
__device__ __forceinline__ void finish_stream(const GemmParams& p, const Sums& sums, uint32_t output,
                                              int first_column) {
  constexpr int kCount = 16 / sizeof(T), kRuns = Layout::kPartColumns / kCount / 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp % 4 * 16 + lane / 4;
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const int column = first_column + (run * 4 + lane % 4) * kCount;
    Part<T> bias{};
    if (p.bias && column < p.columns) {
      bias.words = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(p.bias) + column));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = swizzled(output + run / 2 * kStreamRows * 128, row + half * 8, run % 2 * 4 + lane % 4);
      float v[kCount];
#pragma unroll
      for (int e = 0; e < kCount; ++e) v[e] = sums[0][0][(run * kCount / 2 + e / 2) * 4 + half * 2 + e % 2];
      if (p.residual) Part<T>{load_shared(at)}.add_to(v);
      if (p.bias) bias.add_to(v);
      store_shared(at, Part<T>::of(v).clamped(p.low, p.high).words);
    }
  }
}

template <Math M, int Columns>
__device__ __forceinline__ void implicit_gemm_stream(const GemmStreamParams& p) {
  using T = typename ElementOf<M>::type;
  using Layout = GemmLayout<kStreamRows, Columns, 4>;
  constexpr int kBlock = 128 / sizeof(T), kRowBytes = kStreamRows * 128, kWeightBytes = Columns * 128;
  constexpr int kOutputBlocks = Columns / kBlock;

  extern __shared__ __align__(1024) unsigned char shared[];
  const int stage_bytes = (p.blocks + kOutputBlocks) * kRowBytes;
  const uint32_t weights = shared_address(shared), stages = weights + p.blocks * kWeightBytes;
  const uint32_t weights_full = stages + p.stages * stage_bytes, full = weights_full + 8, empty = full + p.stages * 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = warp / 4;
  const int first_column = blockIdx.x % p.column_tiles * Columns, first_tile = blockIdx.x / p.column_tiles;
  const int step = gridDim.x / p.column_tiles;

  if (threadIdx.x == kStreamTeams * 128) {
    prefetch_tensor_map(p.tensor_map);
    prefetch_tensor_map(p.output_map);
    if (p.residual) prefetch_tensor_map(p.residual_map);
    init_barrier(weights_full, 1);
    for (int i = 0; i < p.stages; ++i) {
      init_barrier(full + i * 8, 1);
      init_barrier(empty + i * 8, 1);
    }
    fence_barriers();
  }
  __syncthreads();

  wait_previous_grid();
  if (team == kStreamTeams) {
    if (lane != 0) return;
    const int columns = min(Columns, p.packed_columns - first_column);
    expect_bytes(weights_full, p.blocks * columns * 128);
    for (int block = 0; block < p.blocks; ++block) {
      copy_bulk(weights + block * kWeightBytes,
                static_cast<const char*>(p.packed) + (int64_t(block) * p.packed_columns + first_column) * 128,
                columns * 128, weights_full);
    }
    int slot = 0;
    uint32_t phase = 1;
    for (int tile = first_tile; tile < p.tiles; tile += step) {
      const uint32_t stage = stages + slot * stage_bytes, output = stage + p.blocks * kRowBytes;
      wait_barrier(empty + slot * 8, phase);
      expect_bytes(full + slot * 8, p.residual ? stage_bytes : p.blocks * kRowBytes);
      for (int block = 0; block < p.blocks; ++block) {
        copy_matrix(stage + block * kRowBytes, p.tensor_map, block * kBlock, tile * kStreamRows, full + slot * 8);
      }
      for (int i = 0; p.residual && i < kOutputBlocks; ++i) {
        copy_matrix(output + i * kRowBytes, p.residual_map, first_column + i * kBlock, tile * kStreamRows,
                    full + slot * 8);
      }
      if (++slot == p.stages) slot = 0, phase ^= 1;
    }
    return;
  }

  float sums[1][1][Layout::kPartColumns / 2];
  wait_barrier(weights_full, 0);
  int number = team;
  for (int tile = first_tile + team * step; tile < p.tiles; tile += kStreamTeams * step, number += kStreamTeams) {
    const int slot = number % p.stages;
    const uint32_t stage = stages + slot * stage_bytes, output = stage + p.blocks * kRowBytes;
    wait_barrier(full + slot * 8, number / p.stages % 2);
    multiply_stream<M, Layout>(p, sums, stage, weights);
    finish_stream<T, Layout>(p, sums, output, first_column);
    fence_shared();
    asm volatile("bar.sync %0, 128;" ::"r"(team + 1) : "memory");
    if (threadIdx.x % 128 == 0) {
      for (int i = 0; i < kOutputBlocks && first_column + i * kBlock < p.columns; ++i) {
        store_matrix(p.output_map, first_column + i * kBlock, tile * kStreamRows, output + i * kRowBytes);
      }
      wait_stores();
      arrive(empty + slot * 8);
    }
    __syncwarp();
  }
}

}  // namespace ai3

#endif

#endif
