// First layers: convolutions of images with a few channels. Some input rows are copied between margins of zeros, so
// that every block of output pixels reads a kernel row in one run and none is clipped at its sides.
#ifndef AI3_STEM_H
#define AI3_STEM_H

#include "ai3/conv2d.h"
#include "ai3/window.h"

namespace ai3 {

// Output pixels of a block of N vectors of filters, which fills the registers as a block of gemm() does; at N = 1 seven
// or so sums in flight for each of two adders.
template <int N>
constexpr int kStemPixels = N == 1 ? (kPanelVectors == 4 ? 14 : 12) : kBlockRows * kPanelVectors / N;

// Rows of outputs between two copies, which share most of their input rows.
constexpr int64_t kStemRows = 4;

inline bool is_stem(const ai3_args* a) {
  constexpr int64_t kMaxChannels = 4, kMaxDepth = 2 * kSumSteps;  // of which one running sum stays exact enough
  const ConvSizes s(a);
  return s.groups == 1 && a->dilation_w == 1 && s.channels <= kMaxChannels && s.depth <= kMaxDepth &&
         s.out_width >= kStemPixels<1>;
}

// Elements of a copied row, and rows of a copy.
inline int64_t stem_row(const ai3_args* a) {
  return ((a->output.size[3] - 1) * a->stride_w + a->kernel_w) * a->input.size[1];
}
inline int64_t stem_rows(const ai3_args* a) {
  return (kStemRows - 1) * a->stride_h + (a->kernel_h - 1) * a->dilation_h + 1;
}
inline int64_t stem_slot_bytes(const ai3_args* a) {
  return ceil_div(stem_row(a) * stem_rows(a) * ConvSizes(a).bytes, 64) * 64;
}

// Input rows top, top + 1, ... of an image, as far as they lie inside it.
template <typename T>
void stem_copy(const ai3_args* a, int64_t image, int64_t top, int64_t rows, T* to) {
  const ConvSizes s(a);
  const int64_t row = stem_row(a), left = a->pad_left * s.channels;
  const int64_t inside = std::max<int64_t>(0, std::min(s.width * s.channels, row - left));
  for (int64_t i = 0; i < rows; ++i, to += row) {
    if (top + i < 0 || top + i >= s.height) continue;
    const T* from = static_cast<const T*>(a->input.data) + (image * s.height + top + i) * s.width * s.channels;
    std::fill(to, to + std::min(left, row), T(0));
    std::copy(from, from + inside, to + left);
    std::fill(to + std::min(row, left + inside), to + row, T(0));
  }
}

// M pixels, `stride` elements apart, by N vectors of filters.
template <int M, int N, typename T>
static void stem_block(const T* pixels, int64_t stride, int64_t row_stride, Taps rows, int64_t steps, const T* b,
                       Target<T> to) {
  fetch_to_write<N>(to.out, M, to.stride);
  Vec<T> sum[M][N] = {};
  b += rows.first * steps * N * kLanes<T>;
  for (int64_t r = rows.first; r < rows.last; ++r) {
    const T* a = pixels + r * row_stride;
    for (int64_t k = 0; k < steps; ++k, ++a, b += N * kLanes<T>) {
      Vec<T> x[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) x[n] = load<Vec<T>>(b + n * kLanes<T>);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec<T> y = broadcast<Vec<T>>(a[m * stride]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[m][n] += y * x[n];
      }
    }
  }
  // In parts that write_block() unrolls.
  constexpr int kPart = M > 8 ? M / 2 : M;
  static_assert(M % kPart == 0 && kPart <= 8, "blocks divide into parts");
#pragma GCC unroll 2
  for (int part = 0; part < M / kPart; ++part) {
    Vec<T> some[kPart][N];
#pragma GCC unroll 8
    for (int m = 0; m < kPart; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) some[m][n] = sum[part * kPart + m][n];
    }
    write_block<kPart, N, T>(some, to);
    to.out += kPart * to.stride;
    if (to.residual) to.residual += kPart * to.stride;
  }
}

// One output row and one panel; `copy` holds the input rows from the row's first on.
template <int N, typename T>
void stem_line(const ai3_args* a, const T* copy, Taps rows, const T* packed, const Target<T>& to) {
  constexpr int M = kStemPixels<N>;
  const int64_t width = a->output.size[3], channels = a->input.size[1], row = stem_row(a);
  for (int64_t next = 0; next < width; next += M) {
    const int64_t q = std::min(next, width - M);  // the last block computes some pixels again
    Target<T> at = to;
    at.out += q * to.stride;
    if (to.residual) at.residual += q * to.stride;
    stem_block<M, N, T>(copy + q * a->stride_w * channels, a->stride_w * channels, row * a->dilation_h, rows,
                        a->kernel_w * channels, packed, at);
  }
}

template <typename T>
void stem_slot(const ai3_args* a, const WorkSplit& shares, int64_t slot) {
  const ConvSizes s(a);
  const Panels<T> panels(s.filters);
  const WorkSplit::Part part = shares.part(slot, s.images * s.out_height, panels.count);
  T* copy = reinterpret_cast<T*>(static_cast<char*>(a->workspace) + slot * stem_slot_bytes(a));
  for (int64_t line = part.unit_begin; line < part.unit_end;) {
    const int64_t image = line / s.out_height, first = line % s.out_height;
    const int64_t count = std::min({kStemRows, part.unit_end - line, s.out_height - first});
    const int64_t top = first * a->stride_h - a->pad_top;
    stem_copy<T>(a, image, top, stem_rows(a) - (kStemRows - count) * a->stride_h, copy);
    for (int64_t i = 0; i < count; ++i, ++line) {
      const Taps rows(top + i * a->stride_h, a->kernel_h, a->dilation_h, s.height);
      for (int64_t p = part.panel_begin; p < part.panel_end; ++p) {
        const auto to = conv_target<T>(a, line * s.out_width, panels.first(p), panels.used(p));
        const T* packed = static_cast<const T*>(a->packed) + panels.first(p) * s.depth;
        with_vectors<T>(panels.width(p), [&](auto n) {
          stem_line<decltype(n)::value, T>(a, copy + i * a->stride_h * stem_row(a), rows, packed, to);
        });
      }
    }
  }
}

}  // namespace ai3
#endif
