// Direct gradient of the input: each pixel gathers what its taps lead to, summed in registers; nothing is lowered.
// Source: the definition, in the register blocks of Zhang, Franchetti and Low, "High Performance Zero-Memory Overhead
// Direct Convolutions", ICML 2018, arXiv 1809.10170. Pixels that are `stride` apart have the same taps and lie next to
// each other in the gradient. Depthwise convolutions run along the channels.
#include "ai3/conv2d_gradient.h"
#include "ai3/pixel_block.h"
#include "ai3/window.h"

namespace {

using ai3::GradientSizes;
using ai3::kWindowPixels;
using ai3::TapsAt;
using ai3::Vec;

// Calls f(tap, line of the gradient) for the kernel's rows by which row `h` of the image counts.
template <typename F>
void for_lines(const ai3_args* a, const GradientSizes& s, int64_t h, const F& f) {
  const TapsAt taps(h + a->pad_top, a->kernel_h, a->stride_h, a->dilation_h);
  for (int64_t r = taps.first, p = taps.source; r < a->kernel_h; r += taps.step, p -= taps.move) {
    if (0 <= p && p < s.out_height) f(r, p);
  }
}

// One row of an image (`line` counts them over all) by the channels of one panel.
template <int N, typename T>
void run_row(const ai3_args* a, const ai3::TapPanels<T>& panels, int64_t line, int64_t index) {
  const GradientSizes& s = panels.s;
  const T* gradient = static_cast<const T*>(a->input.data) + line / s.height * s.out_height * s.out_width * s.filters +
                      index / panels.panels.count * s.group_filters;
  const T* packed = panels.panel(static_cast<const T*>(a->workspace), index);
  T* out = static_cast<T*>(a->output.data) + line * s.width * s.channels + panels.channel(index);
  const int64_t tap_elements = panels.tap_elements(index), used = panels.panels.used(index % panels.panels.count);
  const int64_t apart = a->stride_w * s.channels;
  for (int64_t phase = 0; phase < std::min(a->stride_w, s.width); ++phase) {
    const TapsAt taps(phase + a->pad_left, a->kernel_w, a->stride_w, a->dilation_w);
    const int64_t outputs = ai3::ceil_div(s.width - phase, a->stride_w);
    for (int64_t first = 0; first < outputs; first += ai3::kBlockRows) {
      const int64_t count = std::min<int64_t>(ai3::kBlockRows, outputs - first);
      Vec<T> total[ai3::kBlockRows * N] = {};
      for_lines(a, s, line % s.height, [&](int64_t r, int64_t p) {
        const T* row = gradient + p * s.out_width * s.filters;
        for (int64_t x = taps.first, q = taps.source + first; x < a->kernel_w; x += taps.step, q -= taps.move) {
          const int64_t begin = std::max<int64_t>(0, -q), end = std::min(count, s.out_width - q);
          if (begin >= end) continue;
          ai3::add_segment<N, T>(total + begin * N, row + (q + begin) * s.filters, end - begin, s.filters,
                                 s.group_filters, packed + (r * a->kernel_w + x) * tap_elements);
        }
      });
      ai3::write_rows<T>(total, count, N,
                         {out + phase * s.channels + first * apart, apart, used, nullptr, nullptr, AI3_IDENTITY});
    }
  }
}

// The same of a depthwise convolution, all channels: `weight` is [tap][channel].
template <typename V, typename T>
void depthwise_row(const ai3_args* a, const GradientSizes& s, int64_t line, const T* weight) {
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  const T* gradient = static_cast<const T*>(a->input.data) + line / s.height * s.out_height * s.out_width * s.filters;
  T* out = static_cast<T*>(a->output.data) + line * s.width * s.channels;
  for (int64_t phase = 0; phase < std::min(a->stride_w, s.width); ++phase) {
    const TapsAt taps(phase + a->pad_left, a->kernel_w, a->stride_w, a->dilation_w);
    const int64_t outputs = ai3::ceil_div(s.width - phase, a->stride_w);
    for (int64_t first = 0; first < outputs; first += kWindowPixels) {
      const int64_t count = std::min<int64_t>(kWindowPixels, outputs - first);
      for (int64_t v = 0; v < ai3::ceil_div(s.channels, lanes); ++v) {
        const int64_t channel = std::min(v * lanes, s.channels - lanes);
        V sum[kWindowPixels] = {};
        for_lines(a, s, line % s.height, [&](int64_t r, int64_t p) {
          for (int64_t x = taps.first, q = taps.source + first; x < a->kernel_w; x += taps.step, q -= taps.move) {
            const int64_t begin = -q, end = std::min(count, s.out_width - q);
            const V w = ai3::load<V>(weight + (r * a->kernel_w + x) * s.channels + channel);
            const T* from = gradient + (p * s.out_width + q) * s.filters + channel;
#pragma GCC unroll 8
            for (int m = 0; m < kWindowPixels; ++m) {
              if (m >= begin && m < end) sum[m] += ai3::load<V>(from + m * s.filters) * w;
            }
          }
        });
        T* to = out + (phase + first * a->stride_w) * s.channels + channel;
#pragma GCC unroll 8
        for (int m = 0; m < kWindowPixels; ++m) {
          if (m < count) ai3::store(to + m * a->stride_w * s.channels, sum[m]);
        }
      }
    }
  }
}

template <typename T>
void run_depthwise(const ai3_args* a, const GradientSizes& s) {
  T* packed = static_cast<T*>(a->workspace);
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t tap = 0; tap < s.taps; ++tap)
      packed[tap * s.channels + c] = static_cast<const T*>(a->weight.data)[c * s.taps + tap];
  }
  a->runtime->parallel_for(
      s.images * s.height,
      [](void* arg, int64_t begin, int64_t end) {
        const auto* args = static_cast<const ai3_args*>(arg);
        const GradientSizes sizes = ai3::input_gradient_sizes(args);
        ai3::with_channels<T>(sizes.channels, [&](auto v) {
          for (int64_t line = begin; line < end; ++line)
            depthwise_row<decltype(v), T>(args, sizes, line, static_cast<const T*>(args->workspace));
        });
      },
      const_cast<ai3_args*>(a));
}

template <typename T>
void run_as(const ai3_args* a) {
  const ai3::TapPanels<T> panels(a);
  const GradientSizes& s = panels.s;
  if (s.is_depthwise()) return run_depthwise<T>(a, s);
  panels.pack(a, static_cast<T*>(a->workspace));
  struct Task {
    const ai3_args* args;
    const ai3::TapPanels<T>* panels;
    ai3::WorkSplit shares;
  } task{a,
         &panels,
         {s.images * s.height, panels.count(),
          s.products() * double(s.bytes) / 4 / double(s.images * s.height) / double(panels.count()),
          double(s.out_width * s.filters * s.bytes), double(panels.bytes()) / double(panels.count()),
          std::max<int64_t>(1, a->runtime->num_threads)}};
  a->runtime->parallel_for(
      task.shares.slots(),
      [](void* arg, int64_t begin, int64_t end) {
        const Task& t = *static_cast<const Task*>(arg);
        const ai3::TapPanels<T>& panels = *t.panels;
        for (int64_t slot = begin; slot < end; ++slot) {
          const auto part = t.shares.part(slot, panels.s.images * panels.s.height, panels.count());
          for (int64_t index = part.panel_begin; index < part.panel_end; ++index) {
            ai3::with_vectors<T>(panels.panels.width(index % panels.panels.count), [&](auto n) {
              for (int64_t line = part.unit_begin; line < part.unit_end; ++line)
                run_row<decltype(n)::value, T>(t.args, panels, line, index);
            });
          }
        }
      },
      &task);
}

size_t workspace_bytes(const ai3_args* a) {
  const GradientSizes s = ai3::input_gradient_sizes(a);
  if (s.is_depthwise()) return size_t(s.channels * s.taps * s.bytes);
  return size_t(a->dtype == AI3_FLOAT64 ? ai3::TapPanels<double>(a).bytes() : ai3::TapPanels<float>(a).bytes());
}

void run(const ai3_args* a) {
  ai3::gradient_check(a, ai3::input_gradient_sizes(a), a->output, a->input);
  assert(a->weight.data && a->workspace);
  if (a->dtype == AI3_FLOAT64) return run_as<double>(a);
  run_as<float>(a);
}

double cost(const ai3_args* a) {
  const GradientSizes s = ai3::input_gradient_sizes(a);
  if (s.is_depthwise()) return s.computed(80) + s.moved();
  const double short_sums = 1 + 4.0 / double(std::max<int64_t>(1, s.group_filters));
  // The last block of a row has fewer pixels.
  const int64_t outputs = std::max<int64_t>(1, ai3::ceil_div(s.width, a->stride_w));
  const double blocks = double(ai3::ceil_div(outputs, ai3::kBlockRows) * ai3::kBlockRows) / double(outputs);
  return s.computed(85) * s.padded(s.group_channels) * short_sums * (0.75 + 0.25 * blocks) + s.moved();
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d.grad_input",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = AI3_NHWC,
                           .supports = ai3::gradient_supports,
                           .cost = cost,
                           .workspace_bytes = workspace_bytes,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
