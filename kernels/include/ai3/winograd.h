// Winograd's minimal filtering F(M, R): transformation matrices generated from their interpolation points by Cook-Toom,
// the one-dimensional transforms that apply them, and the products between. Points: Lavin and Gray 2016 for tiles of 4
// inputs; for 6 those of oneDNN's former kernel, whose error is half that of 0, +-1, +-2; for 8 those of NNPACK, within
// 2 % of the least error of any three pairs of eighths.
#ifndef AI3_WINOGRAD_H
#define AI3_WINOGRAD_H

#include "ai3/conv2d.h"

namespace ai3 {

// The finite points by the inputs of a tile; 0 comes first and every other one is followed by its negative. The last
// point is infinity.
template <int Inputs>
struct WinogradPoints;
template <>
struct WinogradPoints<4> {
  static constexpr double value[] = {0, 1, -1};
};
template <>
struct WinogradPoints<6> {
  static constexpr double value[] = {0, 0.625, -0.625, 1.5, -1.5};
};
template <>
struct WinogradPoints<8> {
  static constexpr double value[] = {0, 0.5, -0.5, 1, -1, 2, -2};
};

// output = A^T [(G filter) * (B^T input)], of M outputs, R filter taps and M + R - 1 inputs.
template <int M, int R>
struct WinogradMatrices {
  static constexpr int kSize = M + R - 1;
  double at[M][kSize] = {}, g[kSize][R] = {}, bt[kSize][kSize] = {};

  constexpr WinogradMatrices() {
    const auto& point = WinogradPoints<kSize>::value;
    for (int j = 0; j < kSize; ++j) {
      // B^T: the coefficients of the product of (x - p) over the finite points p but the j-th; G is divided by its
      // value at the j-th point.
      bt[j][0] = 1;
      double scale = 1;
      for (int i = 0, degree = 0; i < kSize - 1; ++i) {
        if (i == j) continue;
        ++degree;
        for (int k = degree; k >= 0; --k) bt[j][k] = (k ? bt[j][k - 1] : 0) - point[i] * bt[j][k];
        if (j < kSize - 1) scale *= point[j] - point[i];
      }
      const bool infinity = j == kSize - 1;
      double power = 1;
      for (int k = 0; k < R; ++k) {
        g[j][k] = infinity ? k == R - 1 : power / scale;
        if (!infinity) power *= point[j];
      }
      power = 1;
      for (int k = 0; k < M; ++k) {
        at[k][j] = infinity ? k == M - 1 : power;
        if (!infinity) power *= point[j];
      }
    }
  }
};

template <int M, int R = 3>
struct Winograd {
  static constexpr int kSize = M + R - 1;
  static constexpr WinogradMatrices<M, R> kMatrices{};

  // B^T d. The rows of a point and its negative share their even and, up to the sign, their odd terms.
  template <typename T, typename V>
  static inline void input(const V* d, V* out) {
    out[0] = input_terms<T, 0, kSize - 1, 1, false>(d, V{});
    pairs<T, 1>(d, out);
    out[kSize - 1] = input_terms<T, kSize - 1, kSize - 1, 1, false>(d, V{});
  }

  // A^T m, by sums and differences of the products of a point and its negative.
  template <typename T, typename V>
  static inline void output(const V* m, V* out) {
    V sum[kSize], difference[kSize];
    sum[0] = difference[0] = m[0];
    sum[kSize - 1] = difference[kSize - 1] = m[kSize - 1];
    for (int i = 1; i < kSize - 1; i += 2) {
      sum[i] = m[i] + m[i + 1];
      difference[i] = m[i] - m[i + 1];
    }
    rows<T, 0>(sum, difference, out);
  }

 private:
  // Terms run from the highest degree down: its coefficient is 1, so that the others are multiply-adds.
  template <typename T, int Row, int Column, int Step, bool Started, typename V>
  static inline V input_terms(const V* d, V sum) {
    if constexpr (Column < 0) {
      return sum;
    } else {
      constexpr double c = kMatrices.bt[Row][Column];
      if constexpr (c == 0)
        return input_terms<T, Row, Column - Step, Step, Started>(d, sum);
      else if constexpr (Started)
        return input_terms<T, Row, Column - Step, Step, true>(d, sum + d[Column] * T(c));
      else
        return input_terms<T, Row, Column - Step, Step, true>(d, d[Column] * T(c));
    }
  }

  template <typename T, int Row, typename V>
  static inline void pairs(const V* d, V* out) {
    if constexpr (Row < kSize - 1) {
      const V even = input_terms<T, Row, kSize - 2, 2, false>(d, V{});
      const V odd = input_terms<T, Row, kSize - 1, 2, false>(d, V{});
      out[Row] = even + odd;
      out[Row + 1] = even - odd;
      pairs<T, Row + 2>(d, out);
    }
  }

  template <typename T, int Row, int Column, bool Started, typename V>
  static inline V output_terms(const V* m, V sum) {
    if constexpr (Column < 0) {
      return sum;
    } else {
      constexpr double c = kMatrices.at[Row][Column];
      constexpr int next = Column == 1 ? 0 : Column - 2;  // odd columns stand for a pair; then comes the point 0
      if constexpr (c == 0)
        return output_terms<T, Row, next, Started>(m, sum);
      else if constexpr (Started)
        return output_terms<T, Row, next, true>(m, sum + m[Column] * T(c));
      else
        return output_terms<T, Row, next, true>(m, m[Column] * T(c));
    }
  }

  template <typename T, int Row, typename V>
  static inline void rows(const V* sum, const V* difference, V* out) {
    if constexpr (Row < M) {
      out[Row] = output_terms<T, Row, kSize - 1, false>(Row % 2 ? difference : sum, V{});
      rows<T, Row + 1>(sum, difference, out);
    }
  }
};

// `next` is what the products after these multiply by: `Lines` of its cache lines a step are brought nearer, to L2, and
// b itself to L1. With no `Lines` both fit L1: one line a step goes there.
template <int Rows, int N, int Lines, typename T>
void multiply_rows(const T* a, int64_t a_stride, const T* b, int64_t depth, T* c, int64_t c_stride, const char* next) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  constexpr int kLine = 64 * (Lines > 0 ? Lines : 1);
  V acc[Rows][N] = {};
  for (int64_t k = 0; k < depth; ++k, b += N * lanes, next += kLine) {
    V x[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      x[n] = load<V>(b + n * lanes);
      if (Lines > 0) __builtin_prefetch(b + (kPrefetchSteps * N + n) * lanes);
      if (n < Lines) __builtin_prefetch(next + n * 64, 0, 2);
    }
    if (Lines == 0) __builtin_prefetch(next);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const V y = broadcast<V>(a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] += y * x[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c + r * c_stride + n * lanes, acc[r][n]);
  }
}

template <int N, int Lines, typename T>
void multiply_parts(const T* a, int64_t a_stride, const T* b, int64_t depth, int64_t tiles, int64_t parts, T* c,
                    int64_t c_stride, const char* next) {
  for (; parts > 0; --parts, next += depth * 64 * (Lines > 0 ? Lines : 1)) {
    const int64_t rows = ceil_div(tiles, parts);
    switch (rows) {
      case 1:
        multiply_rows<1, N, Lines>(a, a_stride, b, depth, c, c_stride, next);
        break;
      case 2:
        multiply_rows<2, N, Lines>(a, a_stride, b, depth, c, c_stride, next);
        break;
      case 3:
        multiply_rows<3, N, Lines>(a, a_stride, b, depth, c, c_stride, next);
        break;
      case 4:
        multiply_rows<4, N, Lines>(a, a_stride, b, depth, c, c_stride, next);
        break;
      case 5:
        multiply_rows<5, N, Lines>(a, a_stride, b, depth, c, c_stride, next);
        break;
      default:
        multiply_rows<6, N, Lines>(a, a_stride, b, depth, c, c_stride, next);
    }
    a += rows * a_stride, c += rows * c_stride, tiles -= rows;
  }
}

constexpr int64_t kNearBytes = 16 * 1024;  // of a panel that shares L1 with the next one

// c[tiles][N vectors] = a[tiles][depth] * b[depth][N vectors], the tiles in balanced register blocks, so that none is
// left with a row or two. The fewer the blocks, the more of `next` each must fetch.
template <int N, typename T>
void multiply_tiles(const T* a, int64_t a_stride, const T* b, int64_t depth, int64_t tiles, T* c, int64_t c_stride,
                    const T* next) {
  const int64_t parts = ceil_div(tiles, kBlockRows);
  const char* lines = reinterpret_cast<const char*>(next);
  if (depth * N * kVectorBytes <= kNearBytes)
    multiply_parts<N, 0>(a, a_stride, b, depth, tiles, parts, c, c_stride, lines);
  else if (parts >= N)
    multiply_parts<N, 1>(a, a_stride, b, depth, tiles, parts, c, c_stride, lines);
  else if (parts >= 2)
    multiply_parts<N, 2>(a, a_stride, b, depth, tiles, parts, c, c_stride, lines);
  else
    multiply_parts<N, N>(a, a_stride, b, depth, tiles, parts, c, c_stride, lines);
}

}  // namespace ai3
#endif
