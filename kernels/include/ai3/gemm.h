// Matrix product with a packed right-hand side: C = activation(A * B + bias + residual), a register block at a time.
// Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 2008, with A left where
// it is: its rows may come in segments from anywhere, which serves convolutions without a column buffer.
#ifndef AI3_GEMM_H
#define AI3_GEMM_H

#include <algorithm>
#include <type_traits>

#include "ai3/activation.h"
#include "ai3/vec.h"

namespace ai3 {

// The register block: 6 rows and 4 vectors fill 32 registers, 6 rows and 2 vectors fill 16.
constexpr int kBlockRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif
// Steps that are summed in registers before they are added to the total, which keeps the rounding error small.
constexpr int64_t kSumSteps = 256;

// B is packed in panels of up to kPanelVectors vectors of columns: panel p, at depth * first(p), holds
// [depth][width(p)]. Widths are balanced: 80 columns are 48 + 32, not 64 + 16. Where the last vector of a panel is not
// filled it begins earlier, and has some columns of the one ahead of it again, so that results are written by whole
// vectors; only a panel of less than one vector has zeros after its last column.
template <typename T>
struct Panels {
  int64_t columns, count, vectors;

  explicit Panels(int64_t columns)
      : columns(columns),
        count((columns + kPanelVectors * kLanes<T> - 1) / (kPanelVectors * kLanes<T>)),
        vectors((columns + kLanes<T> - 1) / kLanes<T>) {}

  int64_t elements(int64_t depth) const { return depth * vectors * kLanes<T>; }
  int64_t first(int64_t p) const { return (vectors / count * p + std::min(p, vectors % count)) * kLanes<T>; }
  int width(int64_t p) const { return int(vectors / count + (p < vectors % count)) * kLanes<T>; }
  int64_t used(int64_t p) const { return std::min<int64_t>(columns - first(p), width(p)); }
  // The first column of vector v, counted from first(p), of a panel with `used` columns.
  static int64_t start(int64_t v, int64_t used) {
    return used < kLanes<T> ? 0 : std::min(v * kLanes<T>, used - kLanes<T>);
  }

  // Packs B, whose element (k, column) lies at row(k)[column * column_stride].
  template <typename Row>
  void pack(int64_t depth, int64_t column_stride, T* dst, const Row& row) const {
    for (int64_t p = 0; p < count; ++p) {
      const int64_t filled = std::min<int64_t>(used(p), kLanes<T>);
      for (int64_t k = 0; k < depth; ++k) {
        const T* from = row(k) + first(p) * column_stride;
        for (int64_t v = 0; v * kLanes<T> < width(p); ++v, dst += kLanes<T>) {
          const T* at = from + start(v, used(p)) * column_stride;
          for (int64_t i = 0; i < filled; ++i) dst[i] = at[i * column_stride];
          std::fill(dst + filled, dst + kLanes<T>, T(0));
        }
      }
    }
  }
};

// Where a block's results go: the first element of C, the bias of its first column, and the epilogue. With `residual`
// equal to `out` the product is added to what is there.
template <typename T>
struct Target {
  T* out;
  int64_t stride;     // between rows of out and of residual
  int64_t columns;    // of the panel that are used
  const T* bias;      // null for none
  const T* residual;  // null for none
  ai3_activation activation;
};

// Rows of A, by segment: the product runs over the segments' steps one after another.
template <typename T>
struct StridedRows {
  const T* base;
  int64_t row_stride, segment_stride;
  const T* row(int64_t segment, int64_t i) const { return base + segment * segment_stride + i * row_stride; }
};

template <typename T>
struct PointerRows {
  const T* const* table;
  int64_t segment_stride, offset;  // offset: added to every pointer
  const T* row(int64_t segment, int64_t i) const { return table[segment * segment_stride + i] + offset; }
};

// Steps that B is fetched ahead of its use: a panel streams from L2, which the hardware's prefetcher alone does not
// hide.
constexpr int kPrefetchSteps = 8;

// sum[M][N] += A[M][steps] * B[steps][N vectors], with one pointer a row of A. A line of `later`, what is multiplied by
// after all rows are done, is brought to L2 with every step.
template <int M, int N, typename T>
inline void multiply_add(Vec<T> (&sum)[M][N], const T* const (&a)[M], int64_t steps, const T* b, const T* later) {
  for (int64_t k = 0; k < steps; ++k, b += N * kLanes<T>, later += kLanes<T>) {
    __builtin_prefetch(later, 0, 2);
    Vec<T> x[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      x[n] = load<Vec<T>>(b + n * kLanes<T>);
      __builtin_prefetch(b + (kPrefetchSteps * N + n) * kLanes<T>);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const Vec<T> y = broadcast<Vec<T>>(a[m][k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] += y * x[n];
    }
  }
}

// Writes `rows` rows of sums, `vectors` vectors each.
template <typename T>
__attribute__((noinline)) void write_rows(const Vec<T>* sums, int64_t rows, int vectors, const Target<T>& to) {
  for (int64_t m = 0; m < rows; ++m, sums += vectors) {
    Vec<T> value[kPanelVectors];
    const auto each = [&](auto f) {
      for (int n = 0; n < vectors; ++n) f(value[n], Panels<T>::start(n, to.columns));
    };
    for (int n = 0; n < vectors; ++n) value[n] = sums[n];
    if (to.bias) each([&](Vec<T>& v, int64_t n) { v += load_part<Vec<T>>(to.bias + n, to.columns); });
    // All of a row is read before any is written, as the residual may be the output, and vectors overlap.
    if (to.residual)
      each([&](Vec<T>& v, int64_t n) { v += load_part<Vec<T>>(to.residual + m * to.stride + n, to.columns); });
    each([&](Vec<T>& v, int64_t n) { store_part(to.out + m * to.stride + n, activate(v, to.activation), to.columns); });
  }
}

// Panels::start() of a panel of N vectors, the first of which is filled.
template <int N, typename T>
inline int64_t vector_start(const Target<T>& to, int n) {
  return n + 1 < N ? n * kLanes<T> : to.columns - kLanes<T>;
}

// The same from registers, for whole vectors and what is soon done: each part of the epilogue is asked for once a
// block.
template <int M, int N, typename T>
inline void write_block(Vec<T> (&sum)[M][N], const Target<T>& to) {
  const auto each = [&](auto f) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const int64_t start = vector_start<N>(to, n);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) f(sum[m][n], m * to.stride + start, start);
    }
  };
  if (to.columns < kLanes<T> || to.activation > AI3_HARDSIGMOID) {
    Vec<T> copy[M][N];  // the sums themselves have no address, or they would live in memory
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) copy[m][n] = sum[m][n];
    }
    return write_rows<T>(&copy[0][0], M, N, to);
  }
  if (to.bias) each([&](Vec<T>& v, int64_t, int64_t n) { v += load<Vec<T>>(to.bias + n); });
  if (to.residual) each([&](Vec<T>& v, int64_t at, int64_t) { v += load<Vec<T>>(to.residual + at); });
  const auto activated = [&](auto which) {
    if (to.activation == which) each([&](Vec<T>& v, int64_t, int64_t) { v = activate(v, which()); });
  };
  activated(std::integral_constant<ai3_activation, AI3_RELU>());
  activated(std::integral_constant<ai3_activation, AI3_RELU6>());
  activated(std::integral_constant<ai3_activation, AI3_HARDSWISH>());
  activated(std::integral_constant<ai3_activation, AI3_HARDSIGMOID>());
  each([&](Vec<T>& v, int64_t at, int64_t) { store(to.out + at, v); });
}

// One register block: M rows from row `first`, N vectors of columns.
template <int M, int N, typename T, typename Rows>
void gemm_block(const Rows& rows, int64_t first, int64_t segments, int64_t depth, const T* b, const T* later,
                const Target<T>& to) {
  Vec<T> sum[M][N];
  // Else it is left to write_block(), which is faster with few sums.
  const bool has_bias = N > 1 && to.bias;
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const Vec<T> bias = has_bias ? load<Vec<T>>(to.bias + vector_start<N>(to, n)) : Vec<T>{};
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) sum[m][n] = bias;
  }
  fetch_to_write<N>(to.out, M, to.stride);
  Vec<T> total[M][N];
  bool has_total = false;
  const auto add_total = [&](auto f) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) f(total[m][n], sum[m][n]);
    }
  };
  int64_t summed = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const T* a[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) a[m] = rows.row(s, first + m);
    for (int64_t left = depth; left > 0;) {
      const int64_t steps = std::min(left, kSumSteps);
      multiply_add<M, N, T>(sum, a, steps, b, later);
      b += steps * N * kLanes<T>;
      later += steps * kLanes<T>;
      left -= steps;
      summed += steps;
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) a[m] += steps;
      if (summed < kSumSteps || (left == 0 && s + 1 == segments)) continue;
      summed = 0;
      if (has_total)
        add_total([](Vec<T>& all, Vec<T>& part) { all += part; });
      else
        add_total([](Vec<T>& all, Vec<T>& part) { all = part; });
      has_total = true;
      add_total([](Vec<T>&, Vec<T>& part) { part = Vec<T>{}; });
    }
  }
  if (has_total) add_total([](Vec<T>& all, Vec<T>& part) { part += all; });
  Target<T> rest = to;
  if (has_bias) rest.bias = nullptr;
  write_block<M, N, T>(sum, rest);
}

// The first blocks fetch what lies behind the panel, a line a step each: the next panel comes from memory meanwhile.
template <int N, typename T, typename Rows>
void gemm_panel(const Rows& rows, int64_t count, int64_t segments, int64_t depth, const T* b, const Target<T>& to) {
  const T *later = b + segments * depth * N * kLanes<T>, *const last = later + segments * depth * N * kLanes<T>;
  for (int64_t m = 0; m < count;) {
    Target<T> at = to;
    at.out += m * to.stride;
    if (to.residual) at.residual += m * to.stride;
    const auto block = [&](auto size) {
      gemm_block<decltype(size)::value, N, T>(rows, m, segments, depth, b, later < last ? later : b, at);
      later += segments * depth * kLanes<T>;
      m += decltype(size)::value;
    };
    const int64_t left = count - m;
    if constexpr (N == 2 && kPanelVectors == 4) {
      // As many sums as a block of four vectors has.
      if (left >= 2 * kBlockRows) {
        block(std::integral_constant<int, 2 * kBlockRows>());
        continue;
      }
    }
    // The last rows are shared out, as few rows at once wait for their own sums.
    switch (left >= 2 * kBlockRows || left <= kBlockRows ? std::min<int64_t>(left, kBlockRows) : (left + 1) / 2) {
      case 6:
        block(std::integral_constant<int, 6>());
        break;
      case 5:
        block(std::integral_constant<int, 5>());
        break;
      case 4:
        block(std::integral_constant<int, 4>());
        break;
      case 3:
        block(std::integral_constant<int, 3>());
        break;
      case 2:
        block(std::integral_constant<int, 2>());
        break;
      default:
        block(std::integral_constant<int, 1>());
    }
  }
}

// Calls f(integral constant of 1..kPanelVectors) for a panel's number of vectors.
template <typename T, typename F>
inline void with_vectors(int width, const F& f) {
  switch (width / kLanes<T>) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
#if defined(__AVX512F__) || defined(__aarch64__)
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
#endif
    default:
      return;
  }
}

// `count` rows of C in one panel of `width` columns (Panels::width): A's rows are `segments` times `depth` long.
template <typename T, typename Rows>
void gemm(const Rows& rows, int64_t count, int64_t segments, int64_t depth, const T* panel, int width,
          const Target<T>& to) {
  with_vectors<T>(width, [&](auto n) { gemm_panel<decltype(n)::value, T>(rows, count, segments, depth, panel, to); });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the threads share a matrix of row units times panels: row_parts times panel_parts slots, one part of it each.
struct WorkSplit {
  int64_t row_parts = 1, panel_parts = 1;

  // Weighs the largest part's multiply-adds (32 a cycle), what it reads (8 bytes a cycle), and the threads' start.
  WorkSplit(int64_t units, int64_t panels, double unit_work, double unit_bytes, double panel_bytes, int64_t threads) {
    constexpr double kStart = 5000;
    const auto time = [&](int64_t rows, int64_t columns) {
      const double u = double(ceil_div(units, rows)), p = double(ceil_div(panels, columns));
      return u * p * unit_work / 32 + (u * unit_bytes + p * panel_bytes) / 8;
    };
    double best = time(1, 1) - kStart;
    for (int64_t parts = 1; parts <= threads; ++parts) {
      const double shared = time(parts, threads / parts);
      if (shared >= best) continue;
      best = shared;
      row_parts = parts;
      panel_parts = threads / parts;
    }
  }
  int64_t slots() const { return row_parts * panel_parts; }

  struct Part {
    int64_t unit_begin, unit_end, panel_begin, panel_end;
  };
  Part part(int64_t slot, int64_t units, int64_t panels) const {
    const int64_t u = slot / panel_parts, p = slot % panel_parts;
    return {units * u / row_parts, units * (u + 1) / row_parts, panels * p / panel_parts,
            panels * (p + 1) / panel_parts};
  }
};

}  // namespace ai3
#endif
