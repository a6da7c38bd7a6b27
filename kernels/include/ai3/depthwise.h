// Depthwise convolution on channels_last images: vectors run along the channels, a block of pixels stays in registers.
// Source: the definition; the register blocks follow Zhang, Lo and Lu, "High Performance Depthwise and Pointwise
// Convolutions on Mobile Devices", AAAI 2020, arXiv 2001.02504.
#ifndef AI3_DEPTHWISE_H
#define AI3_DEPTHWISE_H

#include "ai3/conv2d.h"
#include "ai3/window.h"

namespace ai3 {

inline bool is_depthwise(const ai3_args* a) {
  return a->groups > 1 && a->groups == a->input.size[1] && a->groups == a->output.size[1];
}

// Channels in vectors: vector v begins at start(v), and its weights are packed as [tap][lane] one vector after another.
struct DepthwiseVectors {
  int64_t channels, lanes, count;
  DepthwiseVectors(const ai3_args* a, int64_t lanes)
      : channels(a->input.size[1]), lanes(lanes), count(ceil_div(channels, lanes)) {}
  static int64_t lanes_of(const ai3_args* a) {
    int64_t lanes = 0;
    const auto set = [&](auto v) { lanes = sizeof(v) / (a->dtype == AI3_FLOAT64 ? 8 : 4); };
    a->dtype == AI3_FLOAT64 ? with_channels<double>(a->input.size[1], set)
                            : with_channels<float>(a->input.size[1], set);
    return lanes;
  }
  int64_t start(int64_t v) const { return std::min(v * lanes, channels - lanes); }
};

// The one place that writes outputs: `count` pixels of a vector of channels, the first of them element `at`.
template <typename V, typename T>
inline __attribute__((always_inline)) void depthwise_write(const ai3_args* a, V (&sum)[kWindowPixels], int64_t count,
                                                           int64_t at) {
  const int64_t stride = output_pixel_stride(a);
  T* out = static_cast<T*>(a->output.data) + at;
  const T* residual = static_cast<const T*>(a->residual.data);
  const auto each = [&](auto f) {
#pragma GCC unroll 8
    for (int q = 0; q < kWindowPixels; ++q) {
      if (q < count) f(sum[q], q * stride);
    }
  };
  if (residual) each([&](V& v, int64_t offset) { v += load<V>(residual + at + offset); });
  if (a->activation == AI3_RELU) each([](V& v, int64_t) { v = relu(v); });
  each([&](V& v, int64_t offset) { store(out + offset, v); });
  if (a->activation > AI3_RELU) activate_rows(out, count, stride, sizeof(V) / sizeof(T), a->activation);
}

// Outputs of one row: `count` from `q` on, whose first tap is `top` rows and `left` columns inside the image.
template <typename T>
struct DepthwiseBlock {
  const T* image;
  int64_t top, left, at, count, vector_begin, vector_end;
  Taps rows;
};

// K and S are the kernel's width and stride, or 0 for any. Static, so that the compiler still inlines each kind into
// its one caller.
template <int K, int S, bool kClip, typename V, typename T>
static void depthwise_block(const ai3_args* a, const DepthwiseBlock<T>& block) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  const int64_t channels = a->input.size[1], width = a->input.size[3], kernel = K ? K : a->kernel_w;
  const DepthwiseVectors vectors(a, lanes);
  const T* bias = static_cast<const T*>(a->bias);
  for (int64_t v = block.vector_begin; v < block.vector_end; ++v) {
    const int64_t channel = vectors.start(v);
    const T* weight = static_cast<const T*>(a->packed) + v * a->kernel_h * kernel * lanes;
    V sum[kWindowPixels];
#pragma GCC unroll 8
    for (int q = 0; q < kWindowPixels; ++q) sum[q] = bias ? load<V>(bias + channel) : V{};
    const auto tap_row = [&](int64_t r) __attribute__((always_inline)) {
      const int64_t row = block.top + r * a->dilation_h;
      const WindowRow<T> in{block.image + (row * width + block.left) * channels + channel, channels, -block.left,
                            width - block.left};
      const T* w = weight + r * kernel * lanes;
      const auto step = [&](int q, V x, int64_t tap)
                            __attribute__((always_inline)) { sum[q] += x * load<V>(w + tap * lanes); };
      if constexpr (K)
        slide<K, S, kClip>(in, [](const T* at) { return load<V>(at); }, step);
      else
        slide_any<kClip, V>(in, kernel, a->stride_w, a->dilation_w, step);
    };
    // Unrolled, the nine taps keep the adders busy from one vector to the next.
    if (K == 3 && block.rows.first == 0 && block.rows.last == 3) {
      tap_row(0);
      tap_row(1);
      tap_row(2);
    } else {
      for (int64_t r = block.rows.first; r < block.rows.last; ++r) tap_row(r);
    }
    depthwise_write<V, T>(a, sum, K || !kClip ? kWindowPixels : block.count, block.at + channel);
  }
}

// Blocks of channels whose weights, and the inputs of a row of pixels in registers, stay in the first-level cache from
// one output row to the next.
inline int64_t depthwise_blocks(const ai3_args* a) {
  const ConvSizes s(a);
  constexpr int64_t kCache = 28 * 1024, kVectors = 2;  // the last vector may begin inside the one ahead of it
  const DepthwiseVectors vectors(a, DepthwiseVectors::lanes_of(a));
  const int64_t pixels = a->kernel_h * ((kWindowPixels - 1) * a->stride_w + a->kernel_w);
  const int64_t fit = kCache / ((s.taps + pixels) * vectors.lanes * s.bytes);
  return std::max<int64_t>(1, std::min(vectors.count / kVectors, ceil_div(vectors.count, std::max(kVectors, fit))));
}

// Items are output rows, within blocks of channels. Blocks of pixels go down the rows, which share most of their
// inputs.
template <int K, int S, typename V, typename T>
void depthwise_range(void* arg, int64_t begin, int64_t end) {
  const auto* a = static_cast<const ai3_args*>(arg);
  const ConvSizes s(a);
  constexpr int64_t kNearBytes = 1 << 20;
  const int64_t blocks = depthwise_blocks(a), vectors = DepthwiseVectors(a, sizeof(V) / sizeof(T)).count;
  const int64_t down = s.height * s.width * s.channels * s.bytes <= kNearBytes ? s.out_height : 1;
  for (int64_t item = begin; item < end;) {
    const int64_t first = item % s.out_height, block = item / s.out_height % blocks,
                  image = item / s.out_height / blocks,
                  last = std::min({s.out_height, first + end - item, first + down});
    item += last - first;
    DepthwiseBlock<T> b{static_cast<const T*>(a->input.data) + image * s.height * s.width * s.channels,
                        0,
                        0,
                        0,
                        0,
                        vectors * block / blocks,
                        vectors * (block + 1) / blocks,
                        Taps(0, 0, 1, 0)};
    for_blocks<K != 0>(a, [&](auto clip, int64_t q, int64_t count) {
      b.left = q * a->stride_w - a->pad_left;
      b.count = count;
      for (int64_t p = first; p < last; ++p) {
        b.top = p * a->stride_h - a->pad_top;
        b.rows = Taps(b.top, a->kernel_h, a->dilation_h, s.height);
        b.at = ((image * s.out_height + p) * s.out_width + q) * output_pixel_stride(a);
        depthwise_block<K, S, decltype(clip)::value, V, T>(a, b);
      }
    });
  }
}

inline double depthwise_cost(const ai3_args* a) {
  const ConvSizes s(a);
  const double outputs = double(s.rows) * double(s.filters),
               image = double(s.images * s.channels) * double(s.height * s.width);
  return (2 * outputs * double(s.taps) / 80 + (image + outputs) / 5) * double(s.bytes) / 4;
}

template <typename T>
void depthwise_run(const ai3_args* a) {
  constexpr double kSplitWork = 300e3;  // multiply-adds; below, the threads' start costs more than it saves
  const ConvSizes s(a);
  const auto go = [&](ai3_range_fn body) {
    const int64_t items = s.images * s.out_height * depthwise_blocks(a);
    if (double(s.rows) * double(s.filters) * double(s.taps) < kSplitWork)
      return body(const_cast<ai3_args*>(a), 0, items);
    a->runtime->parallel_for(items, body, const_cast<ai3_args*>(a));
  };
  const int64_t kernel = slides(a) && s.channels >= kLanes<T> ? a->kernel_w : 0, stride = a->stride_w;
  if (kernel == 3 && stride == 1) return go(depthwise_range<3, 1, Vec<T>, T>);
  if (kernel == 3 && stride == 2) return go(depthwise_range<3, 2, Vec<T>, T>);
  if (kernel == 5 && stride == 1) return go(depthwise_range<5, 1, Vec<T>, T>);
  if (kernel == 5 && stride == 2) return go(depthwise_range<5, 2, Vec<T>, T>);
  if (kernel == 7 && stride == 1) return go(depthwise_range<7, 1, Vec<T>, T>);
  with_channels<T>(s.channels, [&](auto v) { go(depthwise_range<0, 0, decltype(v), T>); });
}

inline size_t depthwise_packed_bytes(const ai3_args* a) {
  const ConvSizes s(a);
  if (s.channels == 0) return 0;
  const DepthwiseVectors vectors(a, DepthwiseVectors::lanes_of(a));
  return size_t(vectors.count * vectors.lanes * s.taps * s.bytes);
}

// [channel][tap] to [vector][tap][lane]
inline void depthwise_pack(const ai3_args* a, void* dst) {
  assert(a->weight.data && dst);
  const ConvSizes s(a);
  const DepthwiseVectors vectors(a, DepthwiseVectors::lanes_of(a));
  char* to = static_cast<char*>(dst);
  const char* weight = static_cast<const char*>(a->weight.data);
  for (int64_t v = 0; v < vectors.count; ++v) {
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      for (int64_t lane = 0; lane < vectors.lanes; ++lane, to += s.bytes)
        memcpy(to, weight + ((vectors.start(v) + lane) * s.taps + tap) * s.bytes, size_t(s.bytes));
    }
  }
}

}  // namespace ai3
#endif
