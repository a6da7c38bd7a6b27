// GEMM and col2im: products of the gradient with each tap's weights are added to the pixels that the tap read.
// Source: Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006,
// the backward pass; a tap and some rows of the image at a time, so that the products stay in cache and each thread
// has rows of its own.
#include <cstring>

#include "ai3/conv2d_gradient.h"

namespace {

using ai3::GradientSizes;
using ai3::kLanes;
using ai3::Span;
using ai3::Vec;

// Pixels whose products a slot holds, about.
constexpr int64_t kPixels = 192;

bool is_pointwise(const ai3_args* a) {
  return a->kernel_h * a->kernel_w == 1 && a->stride_h == 1 && a->stride_w == 1 && a->pad_top == 0 &&
         a->pad_bottom == 0 && a->pad_left == 0 && a->pad_right == 0;
}

// Rows of an image that are computed at once.
int64_t unit_rows(const GradientSizes& s) {
  return std::min(s.height, std::max<int64_t>(1, kPixels / std::max<int64_t>(1, s.width)));
}
int64_t units(const GradientSizes& s) { return s.images * ai3::ceil_div(s.height, std::max<int64_t>(1, unit_rows(s))); }

// Products of one tap, a row a pixel of the gradient.
int64_t slot_bytes(const ai3_args* a, const GradientSizes& s) {
  if (is_pointwise(a)) return 0;
  const int64_t rows = ai3::ceil_div(unit_rows(s), a->stride_h) * s.out_width;
  return ai3::ceil_div(rows * ai3::kPanelVectors * ai3::kVectorBytes, 64) * 64;
}

template <typename T>
ai3::WorkSplit split(const ai3_args* a, const ai3::TapPanels<T>& panels) {
  const GradientSizes& s = panels.s;
  const double count = double(std::max<int64_t>(1, panels.count())), all = double(std::max<int64_t>(1, units(s)));
  return {units(s),
          panels.count(),
          s.products() * double(s.bytes) / 4 / all / count,
          double(s.pixels() * s.filters * s.bytes) / all,
          double(panels.bytes()) / count,
          std::max<int64_t>(1, a->runtime ? a->runtime->num_threads : 1)};
}

// to[columns] += from[columns]
template <typename T>
void add(T* to, const T* from, int64_t columns) {
  int64_t i = 0;
  for (; i + kLanes<T> <= columns; i += kLanes<T>)
    ai3::store(to + i, ai3::load<Vec<T>>(to + i) + ai3::load<Vec<T>>(from + i));
  for (; i < columns; ++i) to[i] += from[i];
}

// Some rows of one image by the channels of one panel.
template <typename T>
void run_block(const ai3_args* a, const ai3::TapPanels<T>& panels, int64_t unit, int64_t index, T* products) {
  const GradientSizes& s = panels.s;
  const int64_t rows = unit_rows(s), parts = ai3::ceil_div(s.height, rows), image = unit / parts;
  const int64_t top = unit % parts * rows, bottom = std::min(s.height, top + rows);
  const int width = panels.panels.width(index % panels.panels.count);
  const int64_t used = panels.panels.used(index % panels.panels.count);
  const T* gradient = static_cast<const T*>(a->input.data) + image * s.out_height * s.out_width * s.filters +
                      index / panels.panels.count * s.group_filters;
  const T* packed = panels.panel(static_cast<const T*>(a->workspace), index);
  T* out = static_cast<T*>(a->output.data) + image * s.height * s.width * s.channels + panels.channel(index);
  const auto multiply = [&](int64_t row, int64_t count, const T* tap, T* to, int64_t stride, int64_t columns) {
    const ai3::StridedRows<T> left{gradient + row * s.out_width * s.filters, s.filters, 0};
    ai3::gemm<T>(left, count * s.out_width, 1, s.group_filters, tap, width,
                 {to, stride, columns, nullptr, nullptr, AI3_IDENTITY});
  };
  if (is_pointwise(a)) return multiply(top, bottom - top, packed, out + top * s.width * s.channels, s.channels, used);
  // A vector that is not filled is written whole where there is room.
  const int64_t columns = std::max<int64_t>(used, kLanes<T>);
  for (int64_t pixel = top * s.width; pixel < bottom * s.width; ++pixel)
    memset(out + pixel * s.channels, 0, size_t(used) * sizeof(T));
  for (int64_t r = 0; r < a->kernel_h; ++r) {
    const int64_t down = r * a->dilation_h - a->pad_top;
    const Span lines(0, s.out_height, a->stride_h, down, top, bottom);
    if (lines.first == lines.last) continue;
    for (int64_t x = 0; x < a->kernel_w; ++x) {
      const int64_t right = x * a->dilation_w - a->pad_left;
      const Span inside(0, s.out_width, a->stride_w, right, 0, s.width);
      if (inside.first == inside.last) continue;
      const T* tap = packed + (r * a->kernel_w + x) * panels.tap_elements(index);
      multiply(lines.first, lines.last - lines.first, tap, products, width, columns);
      for (int64_t p = lines.first; p < lines.last; ++p) {
        const T* from = products + ((p - lines.first) * s.out_width + inside.first) * width;
        T* to = out + ((p * a->stride_h + down) * s.width + inside.first * a->stride_w + right) * s.channels;
        for (int64_t q = inside.first; q < inside.last; ++q, from += width, to += a->stride_w * s.channels)
          add(to, from, used);
      }
    }
  }
}

template <typename T>
void run_as(const ai3_args* a) {
  const ai3::TapPanels<T> panels(a);
  panels.pack(a, static_cast<T*>(a->workspace));
  struct Task {
    const ai3_args* args;
    const ai3::TapPanels<T>* panels;
    ai3::WorkSplit shares;
  } task{a, &panels, split<T>(a, panels)};
  a->runtime->parallel_for(
      task.shares.slots(),
      [](void* arg, int64_t begin, int64_t end) {
        const Task& t = *static_cast<const Task*>(arg);
        const ai3::TapPanels<T>& panels = *t.panels;
        for (int64_t slot = begin; slot < end; ++slot) {
          const auto part = t.shares.part(slot, units(panels.s), panels.count());
          char* scratch = static_cast<char*>(t.args->workspace) + panels.bytes() + slot * slot_bytes(t.args, panels.s);
          for (int64_t index = part.panel_begin; index < part.panel_end; ++index) {
            for (int64_t unit = part.unit_begin; unit < part.unit_end; ++unit)
              run_block<T>(t.args, panels, unit, index, reinterpret_cast<T*>(scratch));
          }
        }
      },
      &task);
}

template <typename T>
size_t workspace_as(const ai3_args* a) {
  const ai3::TapPanels<T> panels(a);
  return size_t(panels.bytes() + split<T>(a, panels).slots() * slot_bytes(a, panels.s));
}

size_t workspace_bytes(const ai3_args* a) {
  return a->dtype == AI3_FLOAT64 ? workspace_as<double>(a) : workspace_as<float>(a);
}

void run(const ai3_args* a) {
  ai3::gradient_check(a, ai3::input_gradient_sizes(a), a->output, a->input);
  assert(a->weight.data && a->workspace);
  if (a->dtype == AI3_FLOAT64) return run_as<double>(a);
  run_as<float>(a);
}

double cost(const ai3_args* a) {
  const GradientSizes s = ai3::input_gradient_sizes(a);
  const double added = double(s.pixels()) * double(s.channels) * double(s.taps) * double(s.bytes);
  const double short_sums = 1 + 10.0 / double(std::max<int64_t>(1, s.group_filters));
  return s.computed(85) * s.padded(s.group_channels) * short_sums + s.moved() + added / 20;
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d.grad_input",
                           .algorithm = "gemm",
                           .version = 1,
                           .flags = AI3_NHWC,
                           .supports = ai3::gradient_supports,
                           .cost = cost,
                           .workspace_bytes = workspace_bytes,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
