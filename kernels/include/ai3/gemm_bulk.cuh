// The tile of gemm_tile.cuh with its blocks of depth brought by the tensor memory accelerator (sm_90a).
#pragma once

#include <ai3/gemm_through.cuh>

#if AI3_WGMMA

namespace ai3 {

// The tile of implicit_gemm(), its blocks of depth brought by the tensor memory accelerator at the word of one more
// warp. Rows of float32 go through registers to be rounded, which the accelerator does not do, others for a prologue.
template <Math M, int Rows, int Columns, int Warps, bool Prologue>
__device__ __forceinline__ void implicit_gemm_bulk(const GemmParams& p) {
  using T = typename ElementOf<M>::type;
  using Layout = GemmLayout<Rows, Columns, Warps>;
  constexpr bool kStrict = M == Math::kFloat32;
  constexpr int kParts = kStrict ? 2 : 1, kBlock = 128 / sizeof(T), kStageBytes = (Rows + kParts * Columns) * 128;
  constexpr int kPartSums = Layout::kPartColumns / 2;

  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared), full = base + p.barriers, empty = full + p.slots * 8;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int column_tile = blockIdx.x % p.column_tiles, tile = blockIdx.x / p.column_tiles;
  const int group = tile % p.groups, first_row = tile / p.groups * Rows, first_column = column_tile * Columns;
  const int begin = int(int64_t(p.blocks) * blockIdx.z / gridDim.z);
  const int count = int(int64_t(p.blocks) * (blockIdx.z + 1) / gridDim.z) - begin;

  if (thread == Warps * 32) {
    prefetch_tensor_map(p.tensor_map);
    for (int i = 0; i < p.slots; ++i) {
      init_barrier(full + i * 8, 1);
      init_barrier(empty + i * 8, Warps);
    }
    fence_barriers();
  }
  __syncthreads();

  wait_previous_grid();
  float sums[Layout::kRowParts][Layout::kColumnParts][kPartSums];
  if (warp == Warps) {
    if (lane == 0) {
      const int image = first_row / p.out_pixels, pixel = first_row - image * p.out_pixels;
      const int y = pixel / p.out_width, x = pixel - y * p.out_width;
      const int top = y * p.stride_h - p.pad_top, left = x * p.stride_w - p.pad_left;
      const int columns = min(Columns, p.packed_columns - first_column);
      const char* weights = static_cast<const char*>(p.packed) + group * p.packed_group +
                            (int64_t(begin) * kParts * p.packed_columns + first_column) * 128;
      GemmDepth depth;
      depth.start(p, begin, 0, kBlock);
      int slot = 0;
      uint32_t phase = 1;
      for (int i = 0; i < count; ++i) {
        const uint32_t at = base + slot * kStageBytes, barrier = full + slot * 8;
        wait_barrier(empty + slot * 8, phase);
        expect_bytes(barrier, (Rows + kParts * columns) * 128);
        const int channel = group * p.channels + depth.channel;
        if (p.is_matrix) {
          copy_matrix(at, p.tensor_map, channel, first_row, barrier);
        } else {
          copy_windows(at, p.tensor_map, channel, left, top, image, depth.tap_w * p.dilation_w,
                       depth.tap_h * p.dilation_h, barrier);
        }
        for (int part = 0; part < kParts; ++part) {
          copy_bulk(at + (Rows + part * Columns) * 128, weights, columns * 128, barrier);
          weights += int64_t(p.packed_columns) * 128;
        }
        depth.next_block(p, kBlock);
        if (++slot == p.slots) slot = 0, phase ^= 1;
      }
    }
    __syncwarp();
  } else {
    // Of the channels of this share of the depth, behind the barriers.
    auto* const affine = reinterpret_cast<float2*>(shared + p.barriers + kBulkBarriers);
    if constexpr (Prologue) {
      const float* scale = static_cast<const float*>(p.prologue_scale) + group * p.channels;
      const float* shift = static_cast<const float*>(p.prologue_shift) + group * p.channels;
      for (int i = thread, channel = begin * kBlock + thread; i < count * kBlock; i += Warps * 32) {
        affine[i] = channel < p.channels ? make_float2(scale[channel], shift[channel]) : make_float2(0, 0);
        channel += Warps * 32;
      }
      asm volatile("bar.sync 1, %0;" ::"n"(Warps * 32) : "memory");
    }
    const auto through = [&](uint32_t (&a)[4], int block, int k) {
      if constexpr (Prologue) {
        const float2* of = affine + block * kBlock + k * (kBlock / 4);
        apply_prologue<M>(a, p.prologue_low, [of](int channel) { return of[channel]; });
      }
      round_rows<M>(a);
    };
    // Each warp tells that it has read a block of depth: they need not be at the same one.
    const auto release = [&](int slot) {
      __syncwarp();
      if (lane == 0) arrive(empty + slot * 8);
    };
    int slot = 0, before = 0;
    uint32_t phase = 0;
    if constexpr (!kStrict && (Prologue || M == Math::kTf32)) {
      constexpr int kAtOnce = kThroughAtOnce<Layout>;
      uint32_t a[2][kAtOnce][4];  // those of one are loaded while the products of the other go on
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        wait_barrier(full + slot * 8, phase);
        const uint32_t rows = base + slot * kStageBytes;
#pragma unroll
        for (int k = 0; k < 4; k += kAtOnce) {
          multiply_through<M, Layout>(sums, a[k / kAtOnce % 2], rows, Layout::row(warp) + lane % 16,
                                      matrix_descriptor(rows + Rows * 128), k, i > 0,
                                      [&](uint32_t (&of)[4], int at) { through(of, i, at); });
          wgmma_wait<1>();
          if (k == 0 && i > 0) release(before);
        }
        before = slot;
        if (++slot == p.slots) slot = 0, phase ^= 1;
      }
      wgmma_wait<0>();
    } else if constexpr (!kStrict) {
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        wait_barrier(full + slot * 8, phase);
        multiply_tile<M, Rows, Columns, Warps>(sums, base + slot * kStageBytes, warp, i > 0);
        wgmma_wait<1>();
        if (i > 0) release(before);
        before = slot;
        if (++slot == p.slots) slot = 0, phase ^= 1;
      }
      wgmma_wait<0>();
    } else {
      static_assert(!kStrict || (Layout::kRowParts == 1 && Layout::kColumnParts == 1), "one instruction a step");
#pragma unroll
      for (int i = 0; i < kPartSums; ++i) sums[0][0][i] = 0;
      float products[kPartSums];
      uint32_t high[2][4], low[2][4];
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        wait_barrier(full + slot * 8, phase);
        const uint32_t a = base + slot * kStageBytes, b = a + Rows * 128;
        const uint64_t high_matrix = matrix_descriptor(b), low_matrix = matrix_descriptor(b + Columns * 128);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          uint32_t raw[4];
          load_matrices(raw, swizzled(a, Layout::row(warp) + lane % 16, 2 * k + lane / 16));
          wgmma_wait<1>();
          through(raw, i, k);
#pragma unroll
          for (int e = 0; e < 4; ++e) split_tf32(raw[e], high[k % 2][e], low[k % 2][e]);
          wgmma_fence();
          wgmma<M, Layout::kPartColumns>(products, low[k % 2], high_matrix + k * 2, k > 0);
          wgmma<M, Layout::kPartColumns>(products, high[k % 2], low_matrix + k * 2, 1);
          wgmma<M, Layout::kPartColumns>(products, high[k % 2], high_matrix + k * 2, 1);
          wgmma_commit();
        }
        wgmma_wait<0>();
        release(slot);
        if (++slot == p.slots) slot = 0, phase ^= 1;
#pragma unroll
        for (int e = 0; e < kPartSums; ++e) sums[0][0][e] += products[e];
      }
    }
  }
  finish_gemm<T, Rows, Columns, Warps>(p, sums, Layout::rows_from(first_row), first_column, group, shared,
                                       warp < Warps);
}

}  // namespace ai3

#endif
