// GEMM with im2col: the transposed gradient of the output by the windows of the image, some pixels at a time.
// Source: Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006,
// the backward pass. Each thread has elements of the result of its own, and adds up all pixels for them.
#include <cstring>

#include "ai3/conv2d_gradient.h"
#include "ai3/transpose.h"

namespace {

using ai3::GradientSizes;
using ai3::kLanes;
using ai3::Span;
using ai3::Vec;

// Pixels that are multiplied at once, and summed in registers.
constexpr int64_t kPixels = ai3::kSumSteps;

// One group of the result is a matrix [K/groups][taps * C/groups], in panels of columns.
template <typename T>
struct Result {
  GradientSizes s;
  ai3::Panels<T> panels;

  explicit Result(const ai3_args* a) : s(ai3::weight_gradient_sizes(a)), panels(s.group_channels * s.taps) {}

  int64_t count() const { return s.groups * panels.count; }
  int64_t bytes() const { return ai3::ceil_div(s.groups * panels.elements(s.group_filters) * s.bytes, 64) * 64; }
  int64_t offset(int64_t index) const {
    return index / panels.count * panels.elements(s.group_filters) +
           panels.first(index % panels.count) * s.group_filters;
  }
  // The transposed gradient, and the windows, of kPixels pixels.
  int64_t gradient_bytes() const { return s.group_filters * kPixels * s.bytes; }
  int64_t slot_bytes() const { return gradient_bytes() + kPixels * ai3::kPanelVectors * ai3::kVectorBytes; }
  ai3::WorkSplit split(const ai3_args* a) const {
    const double all = double(std::max<int64_t>(1, count()));
    const int64_t units = ai3::ceil_div(s.group_filters, ai3::kBlockRows);
    return {units,
            count(),
            s.products() * double(s.bytes) / 4 / all / double(std::max<int64_t>(1, units)),
            double(s.pixels() * ai3::kBlockRows * s.bytes),
            double(s.pixels()) * double(s.group_channels * s.taps * s.groups * s.bytes) / all,
            std::max<int64_t>(1, a->runtime ? a->runtime->num_threads : 1)};
  }
};

// `count` pieces of `length` elements.
template <typename T>
void copy_pieces(T* to, int64_t to_step, const T* from, int64_t from_step, int64_t length, int64_t count) {
  for (int64_t n = 0; n < count; ++n, to += to_step, from += from_step) {
    if (length < kLanes<T>) {
      for (int64_t i = 0; i < length; ++i) to[i] = from[i];
      continue;
    }
    for (int64_t i = 0; i + kLanes<T> < length; i += kLanes<T>) ai3::store(to + i, ai3::load<Vec<T>>(from + i));
    ai3::store(to + length - kLanes<T>, ai3::load<Vec<T>>(from + length - kLanes<T>));
  }
}

template <typename T>
void zero_pieces(T* to, int64_t step, int64_t length, int64_t count) {
  for (int64_t n = 0; n < count; ++n, to += step) memset(to, 0, size_t(length) * sizeof(T));
}

// What the columns of a panel read, for `count` pixels of the output from `first` on: a row of `width` a pixel.
template <typename T>
void lower(const ai3_args* a, const Result<T>& result, int64_t index, int64_t first, int64_t count, T* to) {
  const GradientSizes& s = result.s;
  const int64_t p = index % result.panels.count, group = index / result.panels.count;
  const int64_t width = result.panels.width(p), used = std::min<int64_t>(width, result.panels.used(p));
  const int64_t begin = result.panels.first(p), end = begin + used;
  if (used < width) zero_pieces(to + used, width, width - used, count);
  for (int64_t pixel = first; pixel < first + count;) {
    const int64_t line = pixel / s.out_width, q = pixel % s.out_width;
    const int64_t pixels = std::min(s.out_width - q, first + count - pixel);
    for (int64_t column = begin; column < end;) {
      const int64_t tap = column / s.group_channels, channel = column % s.group_channels;
      const int64_t length = std::min(s.group_channels - channel, end - column);
      const int64_t h = line % s.out_height * a->stride_h - a->pad_top + tap / a->kernel_w * a->dilation_h;
      const int64_t right = tap % a->kernel_w * a->dilation_w - a->pad_left;
      const bool outside = h < 0 || h >= s.height;
      const Span inside(q, q + pixels, a->stride_w, right, 0, outside ? 0 : s.width);
      T* row = to + (pixel - first) * width + column - begin;
      const int64_t ahead = std::min(inside.first, q + pixels) - q, within = inside.last - inside.first;
      zero_pieces(row, width, length, ahead);
      if (within > 0) {
        const T* image =
            static_cast<const T*>(a->input.data) +
            ((line / s.out_height * s.height + h) * s.width + inside.first * a->stride_w + right) * s.channels +
            group * s.group_channels + channel;
        copy_pieces(row + ahead * width, width, image, a->stride_w * s.channels, length, within);
      }
      zero_pieces(row + (ahead + within) * width, width, length, pixels - ahead - within);
      column += length;
    }
    pixel += pixels;
  }
}

// Rows [begin, end) of a panel of the result.
template <typename T>
void write(const ai3_args* a, const Result<T>& result, int64_t index, int64_t begin, int64_t end, const T* sums) {
  const GradientSizes& s = result.s;
  const int64_t p = index % result.panels.count, group = index / result.panels.count;
  const int64_t width = result.panels.width(p), *stride = a->output.stride;
  for (int64_t i = 0; i < std::min<int64_t>(width, result.panels.used(p)); ++i) {
    const int64_t column = result.panels.first(p) + i, tap = column / s.group_channels;
    T* to = static_cast<T*>(a->output.data) + group * s.group_filters * stride[0] +
            column % s.group_channels * stride[1] + tap / a->kernel_w * stride[2] + tap % a->kernel_w * stride[3];
    for (int64_t k = begin; k < end; ++k) to[k * stride[0]] = sums[k * width + i];
  }
}

template <typename T>
void run_slot(const ai3_args* a, const Result<T>& result, const ai3::WorkSplit& shares, int64_t slot) {
  const GradientSizes& s = result.s;
  const auto part = shares.part(slot, ai3::ceil_div(s.group_filters, ai3::kBlockRows), result.count());
  const int64_t begin = part.unit_begin * ai3::kBlockRows,
                end = std::min(s.group_filters, part.unit_end * ai3::kBlockRows), rows = end - begin;
  char* scratch = static_cast<char*>(a->workspace) + result.bytes() + slot * result.slot_bytes();
  T* const gradient = reinterpret_cast<T*>(scratch);
  T* const windows = reinterpret_cast<T*>(scratch + result.gradient_bytes());
  T* const sums = static_cast<T*>(a->workspace);
  const auto width = [&](int64_t index) { return result.panels.width(index % result.panels.count); };
  for (int64_t index = part.panel_begin; index < part.panel_end; ++index)
    memset(sums + result.offset(index) + begin * width(index), 0, size_t(rows * width(index)) * sizeof(T));
  for (int64_t first = 0; first < s.pixels(); first += kPixels) {
    const int64_t count = std::min(kPixels, s.pixels() - first);
    for (int64_t index = part.panel_begin; index < part.panel_end; ++index) {
      const int64_t group = index / result.panels.count;
      if (index == part.panel_begin || index % result.panels.count == 0) {
        const T* from = static_cast<const T*>(a->key.data) + first * s.filters + group * s.group_filters + begin;
        ai3::transpose(from, s.filters, count, rows, gradient, kPixels);
      }
      lower(a, result, index, first, count, windows);
      T* to = sums + result.offset(index) + begin * width(index);
      const ai3::StridedRows<T> left{gradient, kPixels, 0};
      ai3::gemm<T>(left, rows, 1, count, windows, width(index),
                   {to, width(index), width(index), nullptr, to, AI3_IDENTITY});
    }
  }
  for (int64_t index = part.panel_begin; index < part.panel_end; ++index)
    write(a, result, index, begin, end, sums + result.offset(index));
}

template <typename T>
void run_as(const ai3_args* a) {
  const Result<T> result(a);
  struct Task {
    const ai3_args* args;
    const Result<T>* result;
    ai3::WorkSplit shares;
  } task{a, &result, result.split(a)};
  a->runtime->parallel_for(
      task.shares.slots(),
      [](void* arg, int64_t begin, int64_t end) {
        const Task& t = *static_cast<const Task*>(arg);
        for (int64_t slot = begin; slot < end; ++slot) run_slot<T>(t.args, *t.result, t.shares, slot);
      },
      &task);
}

template <typename T>
size_t workspace_as(const ai3_args* a) {
  const Result<T> result(a);
  return size_t(result.bytes() + result.split(a).slots() * result.slot_bytes());
}

size_t workspace_bytes(const ai3_args* a) {
  return a->dtype == AI3_FLOAT64 ? workspace_as<double>(a) : workspace_as<float>(a);
}

void run(const ai3_args* a) {
  ai3::gradient_check(a, ai3::weight_gradient_sizes(a), a->input, a->key);
  assert(a->output.data && a->workspace);
  if (a->dtype == AI3_FLOAT64) return run_as<double>(a);
  run_as<float>(a);
}

double cost(const ai3_args* a) {
  const GradientSizes s = ai3::weight_gradient_sizes(a);
  const double lowered = double(s.pixels()) * double(s.channels) * double(s.taps) * double(s.bytes);
  // Pieces shorter than a vector are copied element by element.
  const double piece = std::min(1.0, double(s.group_channels * s.bytes) / ai3::kVectorBytes);
  return s.computed(82) * s.padded(s.group_channels * s.taps) + s.moved() + lowered / 20 / std::max(0.05, piece);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d.grad_weight",
                           .algorithm = "gemm",
                           .version = 1,
                           .flags = AI3_NHWC,
                           .supports = ai3::gradient_supports,
                           .cost = cost,
                           .workspace_bytes = workspace_bytes,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
