// What the gradients of a convolution on channels_last images share: sizes, which positions a tap ties to each other,
// and the weight as the gradient of the input reads it.
#ifndef AI3_CONV2D_GRADIENT_H
#define AI3_CONV2D_GRADIENT_H

#include <cassert>
#include <numeric>

#include "ai3/gemm.h"
#include "ai3/kernel.h"

namespace ai3 {

// Of the convolution: its input is the image, the gradient that of its output.
struct GradientSizes {
  int64_t images, channels, height, width, filters, out_height, out_width;
  int64_t groups, group_channels, group_filters, taps, bytes;  // bytes of an element

  GradientSizes(const ai3_args* a, const ai3_tensor& image, const ai3_tensor& gradient)
      : images(image.size[0]),
        channels(image.size[1]),
        height(image.size[2]),
        width(image.size[3]),
        filters(gradient.size[1]),
        out_height(gradient.size[2]),
        out_width(gradient.size[3]),
        groups(std::max<int64_t>(1, a->groups)),
        group_channels(channels / groups),
        group_filters(filters / groups),
        taps(a->kernel_h * a->kernel_w),
        bytes(a->dtype == AI3_FLOAT64 ? 8 : 4) {}

  bool is_depthwise() const { return groups > 1 && group_channels == 1 && group_filters == 1; }
  int64_t pixels() const { return images * out_height * out_width; }
  double products() const { return double(pixels()) * double(filters) * double(group_channels) * double(taps); }
  // Nanoseconds to move image and gradient once.
  double moved() const {
    const double image = double(images * channels) * double(height * width);
    return (image + double(pixels()) * double(filters)) * double(bytes) / 20;
  }
  // Nanoseconds of the products, at a rate in GFLOP/s of float32.
  double computed(double rate) const { return 2 * products() * double(bytes) / 4 / rate; }
  // How much longer that takes where whole vectors run along so many columns.
  double padded(int64_t columns) const {
    const int64_t lanes = kVectorBytes / bytes;
    return double(ceil_div(columns, lanes) * lanes) / double(std::max<int64_t>(1, columns));
  }
};
inline GradientSizes input_gradient_sizes(const ai3_args* a) { return {a, a->output, a->input}; }
inline GradientSizes weight_gradient_sizes(const ai3_args* a) { return {a, a->input, a->key}; }

inline const char* gradient_supports(const ai3_args* a) {
  return a->dtype == AI3_FLOAT32 || a->dtype == AI3_FLOAT64 ? nullptr : "needs float32 or float64";
}

// Asserts what both gradients count on: images [N,C,H,W] and [N,K,P,Q] in channels_last, all of the same window.
inline void gradient_check(const ai3_args* a, const GradientSizes& s, const ai3_tensor& image,
                           const ai3_tensor& gradient) {
  for (const ai3_tensor* t : {&image, &gradient}) {
    assert(t->ndim == 4 && t->data && (t->size[1] == 1 || t->stride[1] == 1));
    assert(t->size[3] == 1 || t->stride[3] == t->size[1]);
    (void)t;
  }
  assert(image.size[0] == gradient.size[0] && s.channels % s.groups == 0 && s.filters % s.groups == 0);
  assert(!gradient_supports(a) && a->runtime);
  (void)a, (void)s, (void)image, (void)gradient;
}

// The positions first, ..., last - 1 of [begin, end) whose tap lies in [low, high): position p has it at p * stride +
// offset.
struct Span {
  int64_t first, last;
  Span(int64_t begin, int64_t end, int64_t stride, int64_t offset, int64_t low, int64_t high)
      : first(low > offset ? std::max(begin, ceil_div(low - offset, stride)) : begin),
        last(high > offset ? std::max(first, std::min(end, ceil_div(high - offset, stride))) : first) {}
};

// The taps by which a row of the image (or a column), `at` rows below the padding's first one, counts in the output:
// first, first + step, ..., and the output's rows for them: source, source - move, ..., which may lie outside of it.
struct TapsAt {
  int64_t first, step, source, move;
  TapsAt(int64_t at, int64_t kernel, int64_t stride, int64_t dilation) {
    const int64_t common = std::gcd(stride, dilation);
    step = stride / common;
    move = dilation / common;
    first = 0;
    while (first < step && (at - first * dilation) % stride != 0) ++first;
    if (first == step) first = kernel;
    source = (at - first * dilation) / stride;
  }
};

// The weight [K][C/groups][R][S] as matrices [K/groups][channels of a panel], one a group, panel and tap.
template <typename T>
struct TapPanels {
  GradientSizes s;
  Panels<T> panels;

  explicit TapPanels(const ai3_args* a) : s(input_gradient_sizes(a)), panels(s.group_channels) {}

  int64_t count() const { return s.groups * panels.count; }
  int64_t elements() const { return s.groups * panels.elements(s.group_filters * s.taps); }
  int64_t bytes() const { return ceil_div(elements() * s.bytes, 64) * 64; }
  // Of panel `index`, counted over all groups; its taps are tap_elements() apart.
  const T* panel(const T* packed, int64_t index) const { return packed + offset(index); }
  int64_t tap_elements(int64_t index) const { return s.group_filters * panels.width(index % panels.count); }
  // The panel's first channel among all.
  int64_t channel(int64_t index) const {
    return index / panels.count * s.group_channels + panels.first(index % panels.count);
  }

  void pack(const ai3_args* a, T* packed) const {
    struct Task {
      const ai3_args* args;
      const TapPanels* panels;
      T* packed;
    } task{a, this, packed};
    a->runtime->parallel_for(
        count() * s.group_filters,
        [](void* arg, int64_t begin, int64_t end) {
          const Task& t = *static_cast<const Task*>(arg);
          for (int64_t row = begin; row < end; ++row) t.panels->pack_row(t.args, row, t.packed);
        },
        &task);
  }

 private:
  int64_t offset(int64_t index) const {
    const int64_t depth = s.group_filters * s.taps;
    return index / panels.count * panels.elements(depth) + panels.first(index % panels.count) * depth;
  }

  void pack_row(const ai3_args* a, int64_t row, T* packed) const {
    const int64_t index = row / s.group_filters, p = index % panels.count, k = row % s.group_filters;
    const int64_t filter = index / panels.count * s.group_filters + k, width = panels.width(p);
    const int64_t filled = std::min<int64_t>(panels.used(p), kLanes<T>), tap_elements = s.group_filters * width;
    const T* weight = static_cast<const T*>(a->weight.data) + (filter * s.group_channels + panels.first(p)) * s.taps;
    T* to = packed + offset(index) + k * width;
    for (int64_t v = 0; v * kLanes<T> < width; ++v) {
      const T* from = weight + Panels<T>::start(v, panels.used(p)) * s.taps;
      for (int64_t i = 0; i < kLanes<T>; ++i, ++to) {
        for (int64_t tap = 0; tap < s.taps; ++tap) to[tap * tap_elements] = i < filled ? from[i * s.taps + tap] : T(0);
      }
    }
  }
};

}  // namespace ai3
#endif
