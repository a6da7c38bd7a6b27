// Windows that slide along a row of a channels_last image: what depthwise convolution and pooling share. A block of
// output pixels by one vector of channels stays in registers, so that every input pixel is loaded once a kernel row.
#ifndef AI3_WINDOW_H
#define AI3_WINDOW_H

#include <algorithm>
#include <type_traits>

#include "ai3/kernel.h"
#include "ai3/vec.h"

namespace ai3 {

// Pixels of a block: their sums, a kernel row of weights and an input fit 16 registers, and 7 divides the widths of
// networks on images of 224 pixels.
constexpr int kWindowPixels = 7;

// The taps first, ..., last - 1 of a window that read inside [0, size), where tap t reads start + t * dilation.
struct Taps {
  int64_t first, last;
  Taps(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
    first = start >= 0 ? 0 : std::min(kernel, (dilation - 1 - start) / dilation);
    last = start >= size ? first : std::max(first, std::min(kernel, (size - start + dilation - 1) / dilation));
  }
};

// A scalar in place of the vector of one lane.
template <typename T, int kLaneCount>
struct Part {
  typedef T type __attribute__((vector_size(kLaneCount * sizeof(T))));
};
template <typename T>
struct Part<T, 1> {
  using type = T;
};

// Calls f with the widest vector that some channels fill. The last vector of several begins before the end of the one
// ahead of it and computes some channels again: that costs less than a loop over the rest.
template <typename T, int kLaneCount = kLanes<T>, typename F>
inline void with_channels(int64_t channels, const F& f) {
  if constexpr (kLaneCount > 1) {
    if (channels < kLaneCount) return with_channels<T, kLaneCount / 2>(channels, f);
  }
  f(typename Part<T, kLaneCount>::type());
}

// Where a block of output pixels reads: of the pixels from `left` on, first, ..., last - 1 lie inside the image.
template <typename T>
struct WindowRow {
  const T* left;
  int64_t pixel_stride, first, last;
};

// step(q, at(pixel), tap) for each of the block's outputs q and taps: K taps next to each other, outputs S pixels
// apart; at(pixel) is asked for once, with the pixel's offset from the first. kClip: of the pixels read, up to K / 2 at
// either end may lie outside of the image.
template <int K, int S, bool kClip, typename T, typename At, typename Step>
inline __attribute__((always_inline)) void slide(const WindowRow<T>& row, const At& at, const Step& step) {
  constexpr int kPixels = (kWindowPixels - 1) * S + K;
#pragma GCC unroll 32
  for (int j = 0; j < kPixels; ++j) {
    if (kClip && ((j < K / 2 && j < row.first) || (j >= kPixels - K / 2 && j >= row.last))) continue;
    const auto x = at(row.left + j * row.pixel_stride);
#pragma GCC unroll 8
    for (int q = 0; q < kWindowPixels; ++q) {
      if (j - q * S >= 0 && j - q * S < K) step(q, x, j - q * S);
    }
  }
}

// The same for windows and margins of any size.
template <bool kClip, typename V, typename T, typename Step>
inline __attribute__((always_inline)) void slide_any(const WindowRow<T>& row, int64_t kernel, int64_t stride,
                                                     int64_t dilation, const Step& step) {
  for (int64_t tap = 0; tap < kernel; ++tap) {
#pragma GCC unroll 8
    for (int q = 0; q < kWindowPixels; ++q) {
      const int64_t j = q * stride + tap * dilation;
      if (kClip && (j < row.first || j >= row.last)) continue;
      step(q, load<V>(row.left + j * row.pixel_stride), tap);
    }
  }
}

// Whether slide() serves these rows: no further outside than it looks, and outputs for a whole block.
inline bool slides(const ai3_args* a) {
  const int64_t outputs = a->output.size[3],
                overhang = (outputs - 1) * a->stride_w - a->pad_left + a->kernel_w - a->input.size[3];
  return a->dilation_w == 1 && a->pad_left <= a->kernel_w / 2 && overhang <= a->kernel_w / 2 &&
         outputs >= kWindowPixels;
}

// f(clip constant, q, count) for the blocks of a row of outputs. Where slide() serves them all are whole, and the last
// one computes some outputs again; else the last may have less than kWindowPixels.
template <bool kWhole, typename F>
inline void for_blocks(const ai3_args* a, const F& f) {
  const int64_t width = a->output.size[3];
  const int64_t reach = (kWindowPixels - 1) * a->stride_w + (a->kernel_w - 1) * a->dilation_w;
  for (int64_t next = 0; next < width; next += kWindowPixels) {
    const int64_t q = kWhole ? std::min(next, width - kWindowPixels) : next, left = q * a->stride_w - a->pad_left;
    const int64_t count = std::min<int64_t>(kWindowPixels, width - q);
    if (count == kWindowPixels && left >= 0 && left + reach < a->input.size[3])
      f(std::false_type(), q, count);
    else
      f(std::true_type(), q, count);
  }
}

}  // namespace ai3
#endif
