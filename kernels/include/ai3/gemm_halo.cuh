// The tile of gemm_tile.cuh for windows that move by one pixel: its part of the image is brought to shared memory once,
// with the border that windows reach over, and every tap reads its rows there (sm_90a). Where each tap's rows come by
// themselves, as in gemm_bulk.cuh, what the caches give bounds 3x3 convolutions of few channels.
// A tile is of patches of 8x8 output pixels. A patch's rows for a tap are 8 runs of 8 pixels, as far from each other as
// the part of the image is wide: what a matrix descriptor of wgmma describes, from any pixel on, as the permutation of
// 16-byte parts is by their addresses. Source: as gemm_tile.cuh.
#pragma once

#include <ai3/gemm_through.cuh>

#if AI3_WGMMA

namespace ai3 {

// The end of a tile each of whose 2x2 pixels become the largest of them: a thread has both rows of two channels' runs
// of a column, and the thread four lanes on those of the column beside it. Each of the two ends one run.
template <typename T, typename Layout, typename Sums, typename RowOf>
__device__ __forceinline__ void finish_pooled(const GemmParams& p, const Sums& sums, const RowOf& row_of,
                                              int first_column, int group) {
  constexpr int kCount = 16 / sizeof(T), kRuns = Layout::kPartColumns / kCount / 4;
  static_assert(kRuns % 2 == 0);
  const GemmEnd<T> end{p, group};
  const int lane = threadIdx.x % 32, column = first_column + lane % 4 * kCount;
  const bool is_right = lane / 4 % 2 != 0;
#pragma unroll
  for (int i = 0; i < Layout::kRowParts; ++i) {
#pragma unroll
    for (int j = 0; j < Layout::kColumnParts; ++j) {
#pragma unroll
      for (int run = 0; run < kRuns; run += 2) {
        float v[kCount];
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const auto larger = [&](int r) {
            const float* s = &sums[i][j][(r * kCount / 2 + e / 2) * 4 + e % 2];
            return at_least(s[0], s[2]);
          };
          const float first = larger(run), second = larger(run + 1);
          const float other = __shfl_xor_sync(0xffffffff, is_right ? first : second, 4);
          v[e] = at_least(is_right ? second : first, other);
        }
        end.template store<true>(row_of(i), column + j * Layout::kPartColumns + (run + is_right) * kCount * 4, v);
      }
    }
  }
}

// Rounds a part of the image to TF32 where it lies, once for all taps; each of Threads threads a share of it.
template <int Threads>
__device__ __forceinline__ void round_part(uint32_t at, int bytes) {
#pragma unroll 4
  for (int i = threadIdx.x % Threads * 16; i < bytes; i += Threads * 16) {
    const uint4 a = load_shared(at + i);
    store_shared(at + i, {rounded_tf32(a.x), rounded_tf32(a.y), rounded_tf32(a.z), rounded_tf32(a.w)});
  }
}

// The row of the product that is this pixel of a patch, given the same pixel of the tile's first; none outside.
template <int Right>
__device__ __forceinline__ int halo_row(const GemmParams& p, int image, int y, int x, int patch) {
  y += patch / Right * 8, x += patch % Right * 8;
  return y < p.out_height && x < p.out_width ? image * p.out_pixels + y * p.out_width + x : p.rows;
}

// The end of a tile that goes from registers to memory: y and x are the thread's first pixel in the tile's first patch.
template <typename T, typename Layout, int Right, typename Sums>
__device__ __forceinline__ void finish_halo(const GemmParams& p, const Sums& sums, int image, int y, int x,
                                            int first_patch, int first_column, int group) {
  if (p.pools) {
    const auto row_of = [&](int i) {
      const int height = p.out_height / 2, width = p.out_width / 2;
      const int row = (y + (first_patch + i) / Right * 8) / 2, column = (x + (first_patch + i) % Right * 8) / 2;
      return row < height && column < width ? (image * height + row) * width + column : p.rows;
    };
    return finish_pooled<T, Layout>(p, sums, row_of, first_column, group);
  }
  const auto row_of = [&](int i, int half) { return halo_row<Right>(p, image, y + half, x, first_patch + i); };
  finish_directly<T, Layout>(p, sums, row_of, first_column, group);
}

template <Math M, int Down, int Right, int Columns, int Warps>
__device__ __forceinline__ void implicit_gemm_halo(const GemmParams& p) {
  using T = typename ElementOf<M>::type;
  constexpr int kRows = Down * Right * 64, kBlock = 128 / sizeof(T), kWeightBytes = Columns * 128;
  using Layout = GemmLayout<kRows, Columns, Warps>;

  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared), weights_at = base + p.halo_slots * p.halo_bytes;
  const uint32_t halo_full = base + p.barriers, halo_empty = halo_full + p.halo_slots * 8;
  const uint32_t full = halo_empty + p.halo_slots * 8, empty = full + p.slots * 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column_tile = blockIdx.x % p.column_tiles, group = blockIdx.x / p.column_tiles % p.groups;
  const int tile = blockIdx.x / p.column_tiles / p.groups, first_column = column_tile * Columns;
  const int image = tile / (p.tiles_down * p.tiles_right);
  const int first_y = tile / p.tiles_right % p.tiles_down * (8 * Down), first_x = tile % p.tiles_right * (8 * Right);

  if (threadIdx.x == Warps * 32) {
    prefetch_tensor_map(p.tensor_map);
    for (int i = 0; i < p.halo_slots; ++i) {
      init_barrier(halo_full + i * 8, 1);
      init_barrier(halo_empty + i * 8, Warps);
    }
    for (int i = 0; i < p.slots; ++i) {
      init_barrier(full + i * 8, 1);
      init_barrier(empty + i * 8, Warps);
    }
    fence_barriers();
  }
  __syncthreads();

  wait_previous_grid();
  float sums[Layout::kRowParts][Layout::kColumnParts][Layout::kPartColumns / 2];
  if (warp == Warps) {
    if (lane == 0) {
      const int columns = min(Columns, p.packed_columns - first_column);
      const char* packed = static_cast<const char*>(p.packed) + group * p.packed_group + int64_t(first_column) * 128;
      int slot = 0, halo_slot = 0;
      uint32_t phase = 1, halo_phase = 1;
      for (int part = 0; part < p.tap_blocks; ++part) {
        wait_barrier(halo_empty + halo_slot * 8, halo_phase);
        expect_bytes(halo_full + halo_slot * 8, p.halo_width * p.halo_height * 128);
        copy_image(base + halo_slot * p.halo_bytes, p.tensor_map, group * p.channels + part * kBlock,
                   first_x - p.pad_left, first_y - p.pad_top, image, halo_full + halo_slot * 8);
        if (++halo_slot == p.halo_slots) halo_slot = 0, halo_phase ^= 1;
        for (int down = 0; down < p.kernel_h; ++down) {
          const char* from = packed + int64_t(down * p.tap_blocks + part) * p.kernel_w * p.packed_columns * 128;
          for (int right = 0; right < p.kernel_w; ++right) {
            wait_barrier(empty + slot * 8, phase);
            expect_bytes(full + slot * 8, columns * 128);
            copy_bulk(weights_at + slot * kWeightBytes, from, columns * 128, full + slot * 8);
            from += int64_t(p.packed_columns) * 128;
            if (++slot == p.slots) slot = 0, phase ^= 1;
          }
        }
      }
    }
    __syncwarp();
  } else {
    const auto release = [&](uint32_t barrier) {
      __syncwarp();
      if (lane == 0) arrive(barrier);
    };
    // The first pixel of a patch of this warp's warpgroup for the window's first tap.
    const auto patch = [&](int i) {
      const int number = warp / 4 * Layout::kRowParts + i;
      return number / Right * 8 * p.halo_width + number % Right * 8;
    };
    int slot = 0, before = 0, halo_slot = 0;
    uint32_t phase = 0, halo_phase = 0;
    bool accumulates = false;
    for (int part = 0; part < p.tap_blocks; ++part) {
      wait_barrier(halo_full + halo_slot * 8, halo_phase);
      const uint32_t halo = base + halo_slot * p.halo_bytes;
      if constexpr (M == Math::kTf32) {
        round_part<Warps * 32>(halo, p.halo_width * p.halo_height * 128);
        fence_shared();
        asm volatile("bar.sync 1, %0;" ::"n"(Warps * 32) : "memory");
      }
      bool is_pending = false;
      for (int down = 0; down < p.kernel_h; ++down) {
        for (int right = 0; right < p.kernel_w; ++right) {
          const int tap = down * p.dilation_h * p.halo_width + right * p.dilation_w;
          wait_barrier(full + slot * 8, phase);
          const uint64_t b = matrix_descriptor(weights_at + slot * kWeightBytes);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int i = 0; i < Layout::kRowParts; ++i) {
              const uint64_t a = matrix_descriptor(halo + (patch(i) + tap) * 128, p.halo_width * 128);
#pragma unroll
              for (int j = 0; j < Layout::kColumnParts; ++j) {
                wgmma<M, Layout::kPartColumns>(
                    sums[i][j], a + k * 2, b + (j * Layout::kPartColumns * 128 + k * 32) / 16, k > 0 || accumulates);
              }
            }
          }
          wgmma_commit();
          wgmma_wait<1>();
          if (is_pending) release(empty + before * 8);
          before = slot, is_pending = true, accumulates = true;
          if (++slot == p.slots) slot = 0, phase ^= 1;
        }
      }
      wgmma_wait<0>();
      release(empty + before * 8);
      release(halo_empty + halo_slot * 8);
      if (++halo_slot == p.halo_slots) halo_slot = 0, halo_phase ^= 1;
    }
  }
  const int y = first_y + warp % 4 * 2, x = first_x + lane / 4, first_patch = warp / 4 * Layout::kRowParts;
  if (p.pools) {
    if (warp < Warps) finish_halo<T, Layout, Right>(p, sums, image, y, x, first_patch, first_column, group);
    return;
  }
  const auto row_of = [&](int i, int half) { return halo_row<Right>(p, image, y + half, x, first_patch + i); };
  finish_gemm<T, kRows, Columns, Warps>(p, sums, row_of, first_column, group, shared, warp < Warps);
}

}  // namespace ai3

#endif
