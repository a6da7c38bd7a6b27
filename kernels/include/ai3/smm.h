// SMM-Conv's copies of input columns, its packed weights, and the register block that multiplies and adds them. Source:
// Ofir and Ben-Artzi, "SMM-Conv: Scalar Matrix Multiplication with Zero Packing", CVPRW 2022, arXiv 2411.15659.
#ifndef AI3_SMM_H
#define AI3_SMM_H

#include <algorithm>

#include "ai3/gemm.h"
#include "ai3/kernel.h"

namespace ai3 {

// Rows of the register block (output channels) and its vectors: 24 accumulators of 32 registers, or 12 of 16.
constexpr int kSmmRows = kVectorBytes == 64 ? 8 : 4, kSmmVectors = 3;

struct SmmShape {
  int64_t channels, filters, block, blocks;  // of one group; output channels come in `blocks` blocks of `block`
  int64_t channel_block, band_rows, bands;   // input channels and output rows of one buffer
  int64_t phases, phase_rows, plane;         // plane: elements of one (channel, s) copy
  int64_t items, slots, slot_bytes;          // (image, band, group, block) items are shared out to the slots
};

// Copies the columns that offset s needs of the padded input rows first, first + 1, ... of one channel.
template <typename T>
void smm_pack_slice(const ai3_args* a, const SmmShape& shape, const T* image, int64_t s, int64_t first, T* dst) {
  const int64_t height = a->input.size[2], width = a->input.size[3], columns = a->output.size[3], step = a->stride_w;
  const int64_t shift = s * a->dilation_w - a->pad_left;
  const int64_t begin = std::min(columns, shift < 0 ? ceil_div(-shift, step) : 0);
  const int64_t end = std::max(begin, width > shift ? std::min(columns, ceil_div(width - shift, step)) : 0);
  for (int64_t phase = 0; phase < shape.phases; ++phase) {
    for (int64_t i = 0; i < shape.phase_rows; ++i, dst += columns) {
      const int64_t h = first + i * a->stride_h + phase;
      if (h < 0 || h >= height) {
        std::fill(dst, dst + columns, T(0));
        continue;
      }
      const T* row = image + h * width + shift;
      std::fill(dst, dst + begin, T(0));
      if (step == 1) {
        for (int64_t q = begin; q < end; ++q) dst[q] = row[q];
      } else {
        for (int64_t q = begin; q < end; ++q) dst[q] = row[q * step];
      }
      std::fill(dst + end, dst + columns, T(0));
    }
  }
}

// [group][block][channel][s][r][output channel of the block], zero where a block has fewer.
template <typename T>
void smm_pack_weights(const ai3_args* a, const SmmShape& s, T* dst) {
  const int64_t window = a->kernel_h * a->kernel_w, filter_size = s.channels * window;
  for (int64_t block = 0; block < a->groups * s.blocks; ++block) {
    const int64_t first = block % s.blocks * s.block, rows = std::min(s.block, s.filters - first);
    const T* filter = static_cast<const T*>(a->weight.data) + (block / s.blocks * s.filters + first) * filter_size;
    for (int64_t i = 0; i < filter_size; ++i) {
      const int64_t column = i % window / a->kernel_h, row = i % a->kernel_h;
      const int64_t from = i / window * window + row * a->kernel_w + column;
      for (int64_t k = 0; k < s.block; ++k) *dst++ = k < rows ? filter[k * filter_size + from] : T(0);
    }
  }
}

// The work of one register block: `rows` output channels (of at most Rows) and `count` pixels.
template <typename T>
struct SmmTile {
  const T *slices, *weights, *bias, *residual;
  T* out;
  const int64_t* offsets;
  int64_t slice_count, kernel_h, plane, out_stride, rows, count;
  bool first, last;  // block of input channels
  ai3_activation activation;
};

// Static, so that the compiler still inlines each kind of small block into its one caller.
template <int Rows, int N, typename T>
static void smm_accumulate(const SmmTile<T>& t) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  V acc[Rows][N] = {};
  const T *slice = t.slices, *w = t.weights;
  for (int64_t i = 0; i < t.slice_count; ++i, slice += t.plane) {
    for (int64_t r = 0; r < t.kernel_h; ++r, w += Rows) {
      V x[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) x[n] = load<V>(slice + t.offsets[r] + n * lanes);
#pragma GCC unroll 8
      for (int k = 0; k < Rows; ++k) {
        const V weight = broadcast<V>(w[k]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[k][n] += weight * x[n];
      }
    }
  }
  V sums[Rows][N];
#pragma GCC unroll 8
  for (int k = 0; k < Rows; ++k) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[k][n] = acc[k][n];
  }
  for (int64_t k = 0; k < t.rows; ++k) {
    for (int64_t done = 0; done < t.count; done += lanes) {
      const int64_t at = k * t.out_stride + done, count = t.count - done;
      V sum = sums[k][done / lanes];
      if (!t.first)
        sum += load_part<V>(t.out + at, count);
      else if (t.bias)
        sum += broadcast<V>(t.bias[k]);
      if (t.last && t.residual) sum += load_part<V>(t.residual + at, count);
      store_part(t.out + at, t.last ? activate(sum, t.activation) : sum, count);
    }
  }
}

}  // namespace ai3
#endif
