// Depthwise convolution on channels_last images: vectors run along the channels, a block of pixels stays in registers.
// Also the range of a window's taps inside the image, which direct convolution clips with as well.
#ifndef AI3_DEPTHWISE_H
#define AI3_DEPTHWISE_H

#include "ai3/conv2d.h"

namespace ai3 {

// The taps first, ..., last - 1 of a window that read inside [0, size), where tap t reads start + t * dilation.
struct Taps {
  int64_t first, last;
  Taps(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
    first = start >= 0 ? 0 : std::min(kernel, ceil_div(-start, dilation));
    last = start >= size ? first : std::max(first, std::min(kernel, ceil_div(size - start, dilation)));
  }
};

inline bool is_depthwise(const ai3_args* a) {
  return a->groups > 1 && a->groups == a->input.size[1] && a->groups == a->output.size[1];
}

// M pixels and N vectors (or scalars) V of channels, all of whose taps rows x columns lie inside the image.
// Static, so that the compiler still inlines each kind of block into its one caller.
template <int M, int N, typename V, typename T>
static void depthwise_block(const ai3_args* a, const T* window, const T* weight, Taps rows, Taps columns,
                            int64_t channel, int64_t at) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  const int64_t channels = a->input.size[1], row_stride = a->dilation_h * a->input.size[3] * channels;
  V sum[M][N];
  const T* bias = static_cast<const T*>(a->bias);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const V start = bias ? load<V>(bias + channel + n * lanes) : V{};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[m][n] = start;
  }
  for (int64_t r = rows.first; r < rows.last; ++r) {
    for (int64_t x = columns.first; x < columns.last; ++x) {
      const T* pixel = window + r * row_stride + x * a->dilation_w * channels;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const V w = load<V>(weight + (r * a->kernel_w + x) * channels + n * lanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sum[m][n] += w * load<V>(pixel + m * a->stride_w * channels + n * lanes);
      }
    }
  }
  T* out = static_cast<T*>(a->output.data) + at;
  const int64_t out_stride = output_pixel_stride(a);
  const T* residual = static_cast<const T*>(a->residual.data);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const int64_t offset = m * out_stride + n * lanes;
      const V value = residual ? sum[m][n] + load<V>(residual + at + offset) : sum[m][n];
      store(out + offset, a->activation == AI3_RELU ? relu(value) : value);
    }
  }
  if (a->activation > AI3_RELU) activate_rows<V>(out, M, out_stride, N, a->activation);
}

constexpr int64_t kDepthwiseChannels = 128;

// Items are output rows, within blocks of channels.
template <typename T>
void depthwise_range(void* arg, int64_t begin, int64_t end) {
  const auto* a = static_cast<const ai3_args*>(arg);
  const ConvSizes s(a);
  constexpr int lanes = kLanes<T>, kPixels = 4;
  const int64_t blocks = ceil_div(s.channels, kDepthwiseChannels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t p = item % s.out_height, block = item / s.out_height % blocks, image = item / s.out_height / blocks;
    const int64_t top = p * a->stride_h - a->pad_top,
                  channel_end = std::min(s.channels, (block + 1) * kDepthwiseChannels);
    const Taps rows(top, a->kernel_h, a->dilation_h, s.height);
    const T* line = static_cast<const T*>(a->input.data) + (image * s.height + top) * s.width * s.channels;
    for (int64_t q = 0; q < s.out_width;) {
      const int64_t left = q * a->stride_w - a->pad_left;
      const Taps columns(left, a->kernel_w, a->dilation_w, s.width);
      const bool wide = q + kPixels <= s.out_width && left >= 0 &&
                        left + (kPixels - 1) * a->stride_w + (a->kernel_w - 1) * a->dilation_w < s.width;
      const int64_t at = ((image * s.out_height + p) * s.out_width + q) * output_pixel_stride(a);
      int64_t c = block * kDepthwiseChannels;
      const auto blocks_of = [&](auto vectors, auto lane) {
        using V = decltype(lane);
        constexpr int N = decltype(vectors)::value;
        for (constexpr int step = N * sizeof(V) / sizeof(T); c + step <= channel_end; c += step) {
          const T *window = line + left * s.channels + c, *weight = static_cast<const T*>(a->packed) + c;
          if (wide)
            depthwise_block<kPixels, N, V, T>(a, window, weight, rows, columns, c, at + c);
          else
            depthwise_block<1, N, V, T>(a, window, weight, rows, columns, c, at + c);
        }
      };
      blocks_of(std::integral_constant<int, 2>(), Vec<T>());
      blocks_of(std::integral_constant<int, 1>(), Vec<T>());
      blocks_of(std::integral_constant<int, 1>(), T());
      q += wide ? kPixels : 1;
    }
  }
  static_assert(kDepthwiseChannels % lanes == 0, "blocks hold whole vectors");
}

template <typename T>
void depthwise_run(const ai3_args* a) {
  const int64_t blocks = ceil_div(a->input.size[1], kDepthwiseChannels);
  a->runtime->parallel_for(a->output.size[0] * a->output.size[2] * blocks, depthwise_range<T>,
                           const_cast<ai3_args*>(a));
}

inline size_t depthwise_packed_bytes(const ai3_args* a) {
  const ConvSizes s(a);
  return size_t(s.taps * s.channels * s.bytes);
}

// [channel][tap] to [tap][channel]
inline void depthwise_pack(const ai3_args* a, void* dst) {
  assert(a->weight.data && dst);
  const ConvSizes s(a);
  for (int64_t tap = 0; tap < s.taps; ++tap) {
    for (int64_t c = 0; c < s.channels; ++c) {
      memcpy(static_cast<char*>(dst) + (tap * s.channels + c) * s.bytes,
             static_cast<const char*>(a->weight.data) + (c * s.taps + tap) * s.bytes, size_t(s.bytes));
    }
  }
}

inline double depthwise_cost(const ai3_args* a) {
  const ConvSizes s(a);
  const double outputs = double(s.rows) * double(s.filters),
               image = double(s.images * s.channels) * double(s.height * s.width);
  return (2 * outputs * double(s.taps) / 50 + (image + outputs) / 5) * double(s.bytes) / 4;
}

}  // namespace ai3
#endif
