// Products of a run of pixels with a packed panel, added to sums in registers' order: what direct convolutions and the
// gradients of their inputs share.
#ifndef AI3_PIXEL_BLOCK_H
#define AI3_PIXEL_BLOCK_H

#include "ai3/gemm.h"

namespace ai3 {

// total[M][N] += the products of M pixels, `stride` apart, with `steps` rows of a panel.
template <int M, int N, typename T>
void add_pixels(Vec<T>* total, const T* pixels, int64_t stride, int64_t steps, const T* b) {
  const T* a[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) a[m] = pixels + m * stride;
  while (steps > 0) {
    const int64_t now = std::min(steps, kSumSteps);
    Vec<T> sum[M][N] = {};
    multiply_add<M, N, T>(sum, a, now, b, b);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      a[m] += now;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) total[m * N + n] += sum[m][n];
    }
    b += now * N * kLanes<T>;
    steps -= now;
  }
}

// The same for any number of pixels up to a register block's.
template <int N, typename T>
void add_segment(Vec<T>* total, const T* pixels, int64_t count, int64_t stride, int64_t steps, const T* b) {
  if (count == kBlockRows) return add_pixels<kBlockRows, N, T>(total, pixels, stride, steps, b);
  for (; count >= 4; count -= 4, total += 4 * N, pixels += 4 * stride)
    add_pixels<4, N, T>(total, pixels, stride, steps, b);
  for (; count >= 2; count -= 2, total += 2 * N, pixels += 2 * stride)
    add_pixels<2, N, T>(total, pixels, stride, steps, b);
  if (count > 0) add_pixels<1, N, T>(total, pixels, stride, steps, b);
}

}  // namespace ai3
#endif
