// Rows of a tile of gemm_tile.cuh that go through registers between shared memory and the products: to be rounded to
// TF32, which the copies do not, and to be read through a batch norm and a ReLU.
#pragma once

#include <ai3/gemm_tile.cuh>

namespace ai3 {

// Scale, shift and clamp of 16 rows and 32 bytes of depth as a warp's threads give them to an instruction;
// `affine(channel)` gives a channel's scale and shift, counted from the first of these.
template <Math M, typename Affine>
__device__ __forceinline__ void apply_prologue(uint32_t (&a)[4], float low, const Affine& affine) {
  using T = typename ElementOf<M>::type;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (sizeof(T) == 2) {
      const float2 first = affine(half * 8 + threadIdx.x % 4 * 2), second = affine(half * 8 + threadIdx.x % 4 * 2 + 1);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        uint32_t& pair = a[half * 2 + row];
        const float x = widen(T{static_cast<unsigned short>(pair & 0xffff)}) * first.x + first.y;
        const float y = widen(T{static_cast<unsigned short>(pair >> 16)}) * second.x + second.y;
        pair = narrow_pair<T>(at_least(x, low), at_least(y, low));
      }
    } else {
      const float2 of = affine(half * 4 + threadIdx.x % 4);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        uint32_t& one = a[half * 2 + row];
        one = __float_as_uint(at_least(__uint_as_float(one) * of.x + of.y, low));
      }
    }
  }
}

// To TF32 where the products are, which read no more.
template <Math M>
__device__ __forceinline__ void round_rows(uint32_t (&a)[4]) {
  if constexpr (M == Math::kTf32) {
#pragma unroll
    for (int e = 0; e < 4; ++e) a[e] = rounded_tf32(a[e]);
  }
}

#if AI3_WGMMA
// How much of a block of depth is in registers at once, in 32 bytes; beside many sums there are few left.
template <typename Layout>
constexpr int kThroughAtOnce = Layout::kColumnParts > 1 ? 1 : 2;

// Starts the products of the `first`-th 32 bytes of depth and those after, of rows of a tile that go through the
// registers `a`, which are to be left alone until the products have ended. `through(a, k)` changes the k-th 32 bytes;
// the thread's row is the `row`-th of the tile.
template <Math M, typename Layout, int AtOnce, typename Sums, typename Through>
__device__ __forceinline__ void multiply_through(Sums& sums, uint32_t (&a)[AtOnce][4], uint32_t tile, int row,
                                                 uint64_t b, int first, bool accumulate, const Through& through) {
  static_assert(Layout::kRowParts == 1, "more take too many registers");
#pragma unroll
  for (int k = 0; k < AtOnce; ++k) {
    load_matrices(a[k], swizzled(tile, row, 2 * (first + k) + int(threadIdx.x) % 32 / 16));
  }
#pragma unroll
  for (int k = 0; k < AtOnce; ++k) {
    through(a[k], first + k);
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[k][e])::"memory");  // they are there before the fence
  }
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < AtOnce; ++k) {
#pragma unroll
    for (int j = 0; j < Layout::kColumnParts; ++j) {
      wgmma<M, Layout::kPartColumns>(sums[0][j], a[k], b + (j * Layout::kPartColumns * 128 + (first + k) * 32) / 16,
                                     first + k > 0 || accumulate);
    }
  }
  wgmma_commit();
}

#endif

}  // namespace ai3
