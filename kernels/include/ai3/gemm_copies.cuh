// The tile of gemm_tile.cuh with its blocks of depth copied by its own threads: any GPU, any input.
#pragma once

#include <ai3/gemm_through.cuh>

namespace ai3 {

template <bool First, typename A, typename B>
struct ConditionalOf {
  using type = A;
};
template <typename A, typename B>
struct ConditionalOf<false, A, B> {
  using type = B;
};
template <bool First, typename A, typename B>
using Conditional = typename ConditionalOf<First, A, B>::type;

// The rows of a tile, copied 16 bytes at a time, which are channels of one tap: a thread copies the same part of every
// Threads / 8-th row.
template <typename T, int Rows, int Threads>
struct GemmCopies {
  static constexpr int kCount = 16 / sizeof(T), kStep = Threads / 8;
  const GemmParams& p;
  GemmRow<T> rows[Rows / kStep];
  GemmDepth depth;
  uint32_t at;

  __device__ __forceinline__ GemmCopies(const GemmParams& params, uint32_t tile, void*, int first_row, int group,
                                        int block)
      : p(params), at(swizzled(tile, threadIdx.x / 8, threadIdx.x % 8)) {
#pragma unroll
    for (int i = 0; i < Rows / kStep; ++i) rows[i].start(p, first_row + threadIdx.x / 8 + i * kStep, group);
    depth.start(p, block, threadIdx.x % 8 * kCount, 8 * kCount);
  }

  __device__ __forceinline__ void load(uint32_t stage) {
    const int down = depth.inside(p) ? depth.tap_h * p.dilation_h : kOutside, right = depth.tap_w * p.dilation_w;
    const int offset = (down * p.width + right) * int(p.in_pixel) + depth.channel + depth.in_block;
#pragma unroll
    for (int i = 0; i < Rows / kStep; ++i) {
      copy_async_cached(at + stage + i * kStep * 128, rows[i].from + offset, rows[i].inside(p, down, right));
    }
    depth.next_block(p, 8 * kCount);
  }
};

// The same an element at a time, of any channels of any taps: a thread has every Threads / Rows-th part of one row, and
// finds what is common to all rows in a table.
template <typename T, int Rows, int Threads>
struct GemmGather {
  static constexpr int kCount = 16 / sizeof(T), kBlock = 8 * kCount;
  const GemmParams& p;
  GemmRow<T> row;
  uint32_t tile;
  int block;
  int4 (*table)[kBlock];  // of two blocks of depth: how far on, down and right

  __device__ __forceinline__ GemmGather(const GemmParams& params, uint32_t to, void* behind, int first_row, int group,
                                        int first)
      : p(params), tile(to), block(first), table(static_cast<int4 (*)[kBlock]>(behind)) {
    row.start(p, first_row + threadIdx.x % Rows, group);
  }

  __device__ __forceinline__ void load(uint32_t stage) {
    if (threadIdx.x < kBlock) {
      GemmDepth at;
      at.start(p, block, threadIdx.x, kBlock);
      const int down = at.inside(p) ? at.tap_h * p.dilation_h : kOutside, right = at.tap_w * p.dilation_w;
      table[block % 2][threadIdx.x] = {(down * p.width + right) * int(p.in_pixel) + at.channel + at.in_block, down,
                                       right, 0};
    }
    __syncthreads();
#pragma unroll 2
    for (int part = threadIdx.x / Rows; part < 8; part += Threads / Rows) {
      uint32_t words[4] = {};
      if (table[block % 2][part * kCount].y != kOutside) {
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const int4 at = table[block % 2][part * kCount + e];
          const T* from = row.from + at.x;
          const bool inside = row.inside(p, at.y, at.z);
          if constexpr (sizeof(T) == 4) {
            words[e] = load_where(reinterpret_cast<const uint32_t*>(from), inside);
          } else {
            words[e / 2] |= uint32_t(load_where(reinterpret_cast<const unsigned short*>(from), inside)) << (e % 2 * 16);
          }
        }
      }
      asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(swizzled(tile + stage, threadIdx.x % Rows, part)),
                   "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
    ++block;
  }
};

template <Math M, int Rows, int Columns, int Warps, bool Gather>
__device__ __forceinline__ void implicit_gemm(const GemmParams& p) {
  using T = typename ElementOf<M>::type;
  using Layout = GemmLayout<Rows, Columns, Warps>;
  constexpr bool kStrict = M == Math::kFloat32;
  constexpr int kParts = kStrict ? 2 : 1, kThreads = Warps * 32;
  constexpr int kStageBytes = (Rows + kParts * Columns) * 128;
  constexpr int kPartSums = Layout::kPartColumns / 2;

  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int column_tile = blockIdx.x % p.column_tiles, tile = blockIdx.x / p.column_tiles;
  const int group = tile % p.groups, first_row = tile / p.groups * Rows, first_column = column_tile * Columns;
  const int begin = int(int64_t(p.blocks) * blockIdx.z / gridDim.z);
  const int count = int(int64_t(p.blocks) * (blockIdx.z + 1) / gridDim.z) - begin;

  Conditional<Gather, GemmGather<T, Rows, kThreads>, GemmCopies<T, Rows, kThreads>> rows(
      p, base, shared + p.slots * kStageBytes, first_row, group, begin);
  const char* weights = static_cast<const char*>(p.packed) + group * p.packed_group +
                        (int64_t(begin) * kParts * p.packed_columns + first_column) * 128 + thread * 16;
  const int packed_left = (p.packed_columns - first_column) * 8 - thread;  // 16-byte parts from this thread's first on
  const uint32_t weights_at = base + Rows * 128 + thread * 16;

  const auto load = [&](int stage) {
    rows.load(stage * kStageBytes);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < Columns * 8 / kThreads; ++i) {
        if (i * kThreads < packed_left) {
          copy_async(weights_at + stage * kStageBytes + part * Columns * 128 + i * kThreads * 16,
                     weights + i * kThreads * 16);
        }
      }
      weights += int64_t(p.packed_columns) * 128;
    }
  };

  float sums[Layout::kRowParts][Layout::kColumnParts][kPartSums];
#pragma unroll
  for (int i = 0; i < Layout::kRowParts * Layout::kColumnParts * kPartSums; ++i) (&sums[0][0][0])[i] = 0;
  // 32 bytes of depth of rows on their way to the products, through the prologue, and rounded where they are to be
  // TF32.
  const auto through = [&](uint32_t (&a)[4], int block, int k) {
    if (p.prologue_scale != nullptr) {
      const int first = (begin + block) * (128 / int(sizeof(T))) + k * (32 / int(sizeof(T)));
      apply_prologue<M>(a, p.prologue_low, [&](int within) {
        const int channel = first + within, at = group * p.channels + channel;
        if (channel >= p.channels) return make_float2(0, 0);
        return make_float2(__ldg(static_cast<const float*>(p.prologue_scale) + at),
                           __ldg(static_cast<const float*>(p.prologue_shift) + at));
      });
    }
    round_rows<M>(a);
  };
  // The products of one block of depth.
  const auto multiply = [&](int stage, int block) {
    const uint32_t a = base + stage * kStageBytes, b = a + Rows * 128;
#if AI3_WGMMA
    if constexpr (!kStrict) {
      constexpr int kAtOnce = kThroughAtOnce<Layout>;
      uint32_t of[4 / kAtOnce][kAtOnce][4];
#pragma unroll
      for (int k = 0; k < 4; k += kAtOnce) {
        multiply_through<M, Layout>(sums, of[k / kAtOnce], a, Layout::row(warp) + lane % 16, matrix_descriptor(b), k,
                                    true, [&](uint32_t (&row)[4], int at) { through(row, block, at); });
      }
      wgmma_wait<0>();
    } else {
      static_assert(!kStrict || (Layout::kRowParts == 1 && Layout::kColumnParts == 1), "one instruction a step");
      const uint64_t high_matrix = matrix_descriptor(b), low_matrix = matrix_descriptor(b + Columns * 128);
      const int row = Layout::row(warp) + lane % 16;
      float products[kPartSums];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t raw[4], high[4], low[4];
        load_matrices(raw, swizzled(a, row, 2 * k + lane / 16));
        through(raw, block, k);
#pragma unroll
        for (int i = 0; i < 4; ++i) split_tf32(raw[i], high[i], low[i]);
        wgmma_fence();
        wgmma<M, Layout::kPartColumns>(products, low, high_matrix + k * 2, k > 0);
        wgmma<M, Layout::kPartColumns>(products, high, low_matrix + k * 2, 1);
        wgmma<M, Layout::kPartColumns>(products, high, high_matrix + k * 2, 1);
        wgmma_commit();
      }
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < kPartSums; ++i) sums[0][0][i] += products[i];
    }
#else
    const int row = Layout::row(warp) + lane % 16, column = Layout::column(warp) + lane % 8 + lane / 16 * 8;
    float products[kStrict ? Layout::kRowParts : 1][kStrict ? kPartSums : 1] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t af[Layout::kRowParts][4], low[kStrict ? Layout::kRowParts : 1][4];
#pragma unroll
      for (int i = 0; i < Layout::kRowParts; ++i) {
        load_matrices(af[i], swizzled(a, row + i * 16, 2 * k + lane / 16));
        through(af[i], block, k);
        if constexpr (kStrict) {
#pragma unroll
          for (int e = 0; e < 4; ++e) split_tf32(af[i][e], af[i][e], low[i][e]);
        }
      }
#pragma unroll
      for (int j = 0; j < Layout::kPartColumns / 16; ++j) {
        uint32_t bf[4];
        load_matrices(bf, swizzled(b, column + j * 16, 2 * k + lane / 8 % 2));
        if constexpr (kStrict) {
          uint32_t bl[4];
          load_matrices(bl, swizzled(b + Columns * 128, column + j * 16, 2 * k + lane / 8 % 2));
#pragma unroll
          for (int i = 0; i < Layout::kRowParts; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float* d = &products[i][j * 8 + half * 4];
              mma<M>(d, low[i], bf[half * 2], bf[half * 2 + 1]);
              mma<M>(d, af[i], bl[half * 2], bl[half * 2 + 1]);
              mma<M>(d, af[i], bf[half * 2], bf[half * 2 + 1]);
            }
          }
        } else {
#pragma unroll
          for (int i = 0; i < Layout::kRowParts; ++i) {
            mma<M>(&sums[i][0][j * 8], af[i], bf[0], bf[1]);
            mma<M>(&sums[i][0][j * 8 + 4], af[i], bf[2], bf[3]);
          }
        }
      }
    }
    if constexpr (kStrict) {
#pragma unroll
      for (int i = 0; i < Layout::kRowParts; ++i) {
#pragma unroll
        for (int e = 0; e < kPartSums; ++e) sums[i][0][e] += products[i][e];
      }
    }
#endif
  };

#if AI3_WGMMA
  wait_previous_grid();
#endif
  for (int i = 0; i < p.ahead; ++i) {
    if (i < count) load(i);
    commit_copies();
  }
  int stage = 0, next = p.ahead, i = 0;
  do {
    wait_all_but(p.ahead - 1);
#if AI3_WGMMA
    fence_shared();
#endif
    __syncthreads();
    if (i + p.ahead < count) load(next);
    commit_copies();
    multiply(stage, i);
    stage = stage + 1 == p.stages ? 0 : stage + 1;
    next = next + 1 == p.stages ? 0 : next + 1;
  } while (++i < count);
  finish_gemm<T, Rows, Columns, Warps>(p, sums, Layout::rows_from(first_row), first_column, group, shared, true);
}

}  // namespace ai3
