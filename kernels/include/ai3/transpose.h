// Transposition of a matrix into columns of another, a square of vectors at a time in registers.
// Source: the recursive one, which swaps the off-diagonal quarters of squares of 2, 4, ... rows (Eklundh, 1972).
#ifndef AI3_TRANSPOSE_H
#define AI3_TRANSPOSE_H

#include <utility>

#include "ai3/vec.h"

namespace ai3 {

// The lanes of a and b whose index has the bit S clear (high = 0) or set, interleaved in runs of S.
template <int S, int High, typename V, int... I>
inline V half_of(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & S) ? int(sizeof...(I)) + (I & ~S) + High * S : I + High * S)...);
}

template <int S, typename T>
inline void swap_quarters(Vec<T> (&rows)[kLanes<T>]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>();
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & S) continue;
    const Vec<T> low = half_of<S, 0>(rows[i], rows[i + S], lanes);
    rows[i + S] = half_of<S, 1>(rows[i], rows[i + S], lanes);
    rows[i] = low;
  }
}

template <typename T>
inline void transpose_square(Vec<T> (&rows)[kLanes<T>]) {
  swap_quarters<1, T>(rows);
  if constexpr (kLanes<T> > 2) swap_quarters<2, T>(rows);
  if constexpr (kLanes<T> > 4) swap_quarters<4, T>(rows);
  if constexpr (kLanes<T> > 8) swap_quarters<8, T>(rows);
}

// to[c * to_stride + r] = from[r * from_stride + c] for all r < rows and c < columns.
template <typename T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int lanes = kLanes<T>;
  for (int64_t r = 0; r < rows; r += lanes) {
    for (int64_t c = 0; c < columns; c += lanes) {
      const T* const corner = from + r * from_stride + c;
      T* const target = to + c * to_stride + r;
      const int64_t high = rows - r < lanes ? rows - r : lanes, wide = columns - c < lanes ? columns - c : lanes;
      if (high < lanes || wide < lanes) {
        for (int64_t j = 0; j < wide; ++j) {
          for (int64_t i = 0; i < high; ++i) target[j * to_stride + i] = corner[i * from_stride + j];
        }
        continue;
      }
      Vec<T> square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) square[i] = load<Vec<T>>(corner + i * from_stride);
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(target + i * to_stride, square[i]);
    }
  }
}

// The one value of all lanes joined by f, in every lane: lanes apart by 1, 2, 4, ... are joined in turn.
template <int S, typename V, typename F, int... I>
inline V join_apart(V value, const F& f, std::integer_sequence<int, I...> lanes) {
  value = f(value, __builtin_shufflevector(value, value, (I ^ S)...));
  if constexpr (2 * S < int(sizeof...(I))) return join_apart<2 * S>(value, f, lanes);
  return value;
}

template <typename T, typename F>
inline T join_lanes(Vec<T> value, const F& f) {
  return join_apart<1>(value, f, std::make_integer_sequence<int, kLanes<T>>())[0];
}

}  // namespace ai3
#endif
