// The tile of gemm_halo.cuh where all weights of its columns fit into shared memory: they are brought once, and a
// block computes tile after tile, as many blocks as the GPU has multiprocessors (sm_90a). With few channels the weights
// would be most of what each tile reads. Three warpgroups take turns, so that one multiplies while another
// writes its tile or waits for the next. In TF32 the tile is turned: the columns are an instruction's rows and 16 rows
// of 8 pixels its columns, for which a quarter less is read from shared memory than for twice 64 pixels by 64 channels.
// Source: as gemm_tile.cuh; the turns are those of CUTLASS's "pingpong" kernels.
#pragma once

#include <ai3/gemm_halo.cuh>

#if AI3_WGMMA

namespace ai3 {

// The end of a turned tile, whose first pixel is at y and x: of each row of 8 pixels a thread has two beside each other
// in two of four channels, and the thread four lanes on has the other two. Each of the two ends one of the pixels, or
// of the pools of two pairs of rows.
__device__ __forceinline__ void finish_turned(const GemmParams& p, const float (&sums)[64], int image, int y, int x,
                                              int first_column, int group) {
  const GemmEnd<float> end{p, group};
  const int lane = threadIdx.x % 32, column = first_column + int(threadIdx.x) / 32 % 4 * 16 + lane / 8 * 4;
  const bool is_odd = lane / 4 % 2 != 0;
  const auto store = [&](float first, float first_on, float second, float second_on, int row, int at, bool is_inside) {
    const float other = __shfl_xor_sync(0xffffffff, is_odd ? first : second, 4);
    const float other_on = __shfl_xor_sync(0xffffffff, is_odd ? first_on : second_on, 4);
    float v[4] = {is_odd ? other : first, is_odd ? second : other, is_odd ? other_on : first_on,
                  is_odd ? second_on : other_on};
    end.store<true>(is_inside ? row + at : p.rows, column, v);
  };
  if (!p.pools) {
    const int at = x + lane % 4 * 2 + int(is_odd);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float* s = &sums[i * 4];
      const bool is_inside = y + i < p.out_height && at < p.out_width;
      store(s[0], s[2], s[1], s[3], image * p.out_pixels + (y + i) * p.out_width, at, is_inside);
    }
    return;
  }
  const int height = p.out_height / 2, width = p.out_width / 2, at = x / 2 + lane % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto largest = [&](int below, int half) {
      const float* s = &sums[(i * 2 + below) * 8 + half * 2];
      return at_least(at_least(s[0], s[1]), at_least(s[4], s[5]));
    };
    const int row = y / 2 + i * 2 + int(is_odd);
    store(largest(0, 0), largest(0, 1), largest(1, 0), largest(1, 1), (image * height + row) * width, at,
          row < height && at < width);
  }
}

template <Math M, int Down, int Right, int Columns>
__device__ __forceinline__ void implicit_gemm_resident(const GemmParams& p) {
  using T = typename ElementOf<M>::type;
  constexpr int kTeams = kResidentTeams, kTeamWarps = 4, kRows = Down * Right * 64;
  constexpr int kBlock = 128 / sizeof(T), kBlockBytes = Columns * 128;
  constexpr bool kIsTurned = M == Math::kTf32;
  static_assert(!kIsTurned || (Columns == 64 && Down == 2 && Right == 1));
  using Layout = GemmLayout<kRows, Columns, kTeamWarps>;

  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared), weights_at = base + kTeams * p.halo_slots * p.halo_bytes;
  const uint32_t weights_full = weights_at + p.slots * kBlockBytes;
  const uint32_t halo_full = weights_full + 8, halo_empty = halo_full + kTeams * p.halo_slots * 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = warp / kTeamWarps;
  const int column_tile = blockIdx.x % p.column_tiles, group = blockIdx.x / p.column_tiles % p.groups;
  const int step = gridDim.x / (p.column_tiles * p.groups), first_column = column_tile * Columns;
  const int first_tile = blockIdx.x / p.column_tiles / p.groups;

  if (threadIdx.x == kTeams * kTeamWarps * 32) {
    prefetch_tensor_map(p.tensor_map);
    init_barrier(weights_full, 1);
    for (int i = 0; i < kTeams * p.halo_slots; ++i) {
      init_barrier(halo_full + i * 8, 1);
      init_barrier(halo_empty + i * 8, kTeamWarps);
    }
    fence_barriers();
  }
  __syncthreads();

  wait_previous_grid();
  if (team == kTeams) {
    if (lane != 0) return;
    const int columns = min(Columns, p.packed_columns - first_column);
    const char* packed = static_cast<const char*>(p.packed) + group * p.packed_group + int64_t(first_column) * 128;
    expect_bytes(weights_full, p.slots * columns * 128);
    for (int i = 0; i < p.slots; ++i) {
      copy_bulk(weights_at + i * kBlockBytes, packed + int64_t(i) * p.packed_columns * 128, columns * 128,
                weights_full);
    }
    int number = 0;  // of the parts that each warpgroup has been brought
    for (int first = first_tile; first < p.tiles; first += kTeams * step, number += p.tap_blocks) {
      for (int part = 0; part < p.tap_blocks; ++part) {
        for (int to = 0; to < kTeams; ++to) {
          const int tile = first + to * step, image = tile / (p.tiles_down * p.tiles_right);
          if (tile >= p.tiles) break;
          const int y = tile / p.tiles_right % p.tiles_down * (8 * Down), x = tile % p.tiles_right * (8 * Right);
          const int slot = to * p.halo_slots + (number + part) % p.halo_slots;
          wait_barrier(halo_empty + slot * 8, (number + part) / p.halo_slots % 2 ^ 1);
          expect_bytes(halo_full + slot * 8, p.halo_width * p.halo_height * 128);
          copy_image(base + slot * p.halo_bytes, p.tensor_map, group * p.channels + part * kBlock, x - p.pad_left,
                     y - p.pad_top, image, halo_full + slot * 8);
        }
      }
    }
    return;
  }

  constexpr int kParts = kIsTurned ? 1 : Layout::kRowParts;
  float sums[kParts][1][kRows * Columns / 128 / kParts];
  wait_barrier(weights_full, 0);
  int number = 0;
  for (int tile = first_tile + team * step; tile < p.tiles; tile += kTeams * step) {
    for (int part = 0; part < p.tap_blocks; ++part, ++number) {
      const int slot = team * p.halo_slots + number % p.halo_slots;
      wait_barrier(halo_full + slot * 8, number / p.halo_slots % 2);
      const uint32_t halo = base + slot * p.halo_bytes;
      if constexpr (M == Math::kTf32) {
        round_part<kTeamWarps * 32>(halo, p.halo_width * p.halo_height * 128);
        fence_shared();
        asm volatile("bar.sync %0, 128;" ::"r"(team + 1) : "memory");
      }
      uint32_t weights = weights_at + part * p.kernel_w * kBlockBytes;
      for (int down = 0; down < p.kernel_h; ++down) {
        for (int right = 0; right < p.kernel_w; ++right, weights += kBlockBytes) {
          const int tap = down * p.dilation_h * p.halo_width + right * p.dilation_w;
          const uint64_t b = matrix_descriptor(weights);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int accumulates = (k | part | down | right) != 0;
            if constexpr (kIsTurned) {
              const uint64_t pixels = matrix_descriptor(halo + tap * 128, p.halo_width * 128);
              wgmma<M, kRows>(sums[0][0], b + k * 2, pixels + k * 2, accumulates);
            } else {
#pragma unroll
              for (int i = 0; i < Layout::kRowParts; ++i) {
                const int patch = i / Right * 8 * p.halo_width + i % Right * 8;
                const uint64_t a = matrix_descriptor(halo + (patch + tap) * 128, p.halo_width * 128);
                wgmma<M, Layout::kPartColumns>(sums[i][0], a + k * 2, b + k * 2, accumulates);
              }
            }
          }
          wgmma_commit();
        }
        weights += (p.tap_blocks - 1) * p.kernel_w * kBlockBytes;
      }
      wgmma_wait<0>();
      __syncwarp();
      if (lane == 0) arrive(halo_empty + slot * 8);
    }
    const int image = tile / (p.tiles_down * p.tiles_right);
    const int y = tile / p.tiles_right % p.tiles_down * (8 * Down), x = tile % p.tiles_right * (8 * Right);
    if constexpr (kIsTurned) {
      finish_turned(p, sums[0][0], image, y, x, first_column, group);
    } else {
      finish_halo<T, Layout, Right>(p, sums, image, y + warp % 4 * 2, x + lane / 4, 0, first_column, group);
    }
  }
}

}  // namespace ai3

#endif
