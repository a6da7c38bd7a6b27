// Direct gradient of the weight: outer products of the gradient's pixels and what a tap reads, summed in registers.
// Source: the definition. Of a group's input and output channels, the more numerous are the vectors, and the others are
// broadcast; depthwise convolutions run along the channels. Each thread has elements of the result of its own.
#include <cstring>

#include "ai3/conv2d_gradient.h"
#include "ai3/window.h"

namespace {

using ai3::GradientSizes;
using ai3::kBlockRows;
using ai3::kPanelVectors;
using ai3::Span;

// How one matrix [broadcast channels][vectors of channels] a group and tap is cut into blocks of registers.
struct Blocks {
  GradientSizes s;
  bool image_in_vectors;
  int64_t rows, channels, lanes, vectors, row_blocks, vector_blocks;

  Blocks(const ai3_args* a, int64_t lanes)
      : s(ai3::weight_gradient_sizes(a)),
        image_in_vectors(is_image_in_vectors(s)),
        rows(image_in_vectors ? s.group_filters : s.group_channels),
        channels(image_in_vectors ? s.group_channels : s.group_filters),
        lanes(lanes),
        vectors(ai3::ceil_div(channels, lanes)),
        row_blocks(ai3::ceil_div(rows, kBlockRows)),
        vector_blocks(ai3::ceil_div(vectors, kPanelVectors)) {}

  static bool is_image_in_vectors(const GradientSizes& s) { return s.group_channels >= s.group_filters; }
  static int64_t channels_of(const GradientSizes& s) {
    return is_image_in_vectors(s) ? s.group_channels : s.group_filters;
  }
  int64_t count() const { return s.groups * s.taps * row_blocks * vector_blocks; }
  // The last vector begins inside the one ahead of it.
  int64_t start(int64_t vector) const { return std::min(vector * lanes, channels - lanes); }
  int64_t matrix(int64_t index) const { return index / (row_blocks * vector_blocks); }
  int64_t row(int64_t index, int64_t more = 0) const {
    return rows * (index / vector_blocks % row_blocks + more) / row_blocks;
  }
  int64_t vector(int64_t index, int64_t more = 0) const {
    return vectors * (index % vector_blocks + more) / vector_blocks;
  }
};

// Pixels of the output, and where both sides have them.
template <typename T>
struct Pixels {
  const T *broadcast, *vectors;
  int64_t lines, columns, broadcast_line, broadcast_step, vector_line, vector_step;
  int64_t last;  // where the last vector begins
};

// total[M][N] += the outer products at these pixels; `stride` vectors lie between the rows of total.
template <int M, int N, typename V, typename T>
void add_products(V* total, int64_t stride, const Pixels<T>& pixels) {
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  V sum[M][N] = {};
  for (int64_t line = 0; line < pixels.lines; ++line) {
    const T *y = pixels.broadcast + line * pixels.broadcast_line, *x = pixels.vectors + line * pixels.vector_line;
    for (int64_t i = 0; i < pixels.columns; ++i, y += pixels.broadcast_step, x += pixels.vector_step) {
      V loaded[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) loaded[n] = ai3::load<V>(x + (n + 1 < N ? n * lanes : pixels.last));
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] += loaded[n] * y[m];
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) total[m * stride + n] += sum[m][n];
  }
}

template <int M, typename V, typename T>
void add_rows(int64_t vectors, V* total, int64_t stride, const Pixels<T>& pixels) {
  switch (vectors) {
    case 1:
      return add_products<M, 1>(total, stride, pixels);
    case 2:
      return add_products<M, 2>(total, stride, pixels);
    default:
      if constexpr (kPanelVectors > 2 && sizeof(V) == ai3::kVectorBytes) {
        if (vectors == 3) return add_products<M, 3>(total, stride, pixels);
        return add_products<M, 4>(total, stride, pixels);
      }
  }
}

template <typename V, typename T>
void add_block(int64_t rows, int64_t vectors, V* total, int64_t stride, const Pixels<T>& pixels) {
  static_assert(kBlockRows == 6);
  switch (rows) {
    case 6:
      return add_rows<6>(vectors, total, stride, pixels);
    case 5:
      return add_rows<5>(vectors, total, stride, pixels);
    case 4:
      return add_rows<4>(vectors, total, stride, pixels);
    case 3:
      return add_rows<3>(vectors, total, stride, pixels);
    case 2:
      return add_rows<2>(vectors, total, stride, pixels);
    default:
      return add_rows<1>(vectors, total, stride, pixels);
  }
}

// The pixels of lines [top, bottom) and columns [left, right) of one image, for one block.
template <typename V, typename T>
void add_pixels(const ai3_args* a, const Blocks& b, int64_t index, int64_t image, int64_t top, int64_t bottom,
                int64_t left, int64_t right) {
  const GradientSizes& s = b.s;
  const int64_t group = b.matrix(index) / s.taps, tap = b.matrix(index) % s.taps;
  const int64_t down = tap / a->kernel_w * a->dilation_h - a->pad_top,
                along = tap % a->kernel_w * a->dilation_w - a->pad_left;
  const Span lines(top, bottom, a->stride_h, down, 0, s.height), columns(left, right, a->stride_w, along, 0, s.width);
  if (lines.first >= lines.last || columns.first >= columns.last) return;
  const T* read =
      static_cast<const T*>(a->input.data) +
      ((image * s.height + lines.first * a->stride_h + down) * s.width + columns.first * a->stride_w + along) *
          s.channels +
      group * s.group_channels;
  const T* gradient = static_cast<const T*>(a->key.data) +
                      ((image * s.out_height + lines.first) * s.out_width + columns.first) * s.filters +
                      group * s.group_filters;
  const int64_t read_line = a->stride_h * s.width * s.channels, read_step = a->stride_w * s.channels;
  const int64_t gradient_line = s.out_width * s.filters, gradient_step = s.filters;
  const int64_t row = b.row(index), vector = b.vector(index), vectors = b.vector(index, 1) - vector;
  const bool swap = !b.image_in_vectors;
  const Pixels<T> pixels{(swap ? read : gradient) + row,
                         (swap ? gradient : read) + b.start(vector),
                         lines.last - lines.first,
                         columns.last - columns.first,
                         swap ? read_line : gradient_line,
                         swap ? read_step : gradient_step,
                         swap ? gradient_line : read_line,
                         swap ? gradient_step : read_step,
                         b.start(vector + vectors - 1) - b.start(vector)};
  V* total = static_cast<V*>(a->workspace) + (b.matrix(index) * b.rows + row) * b.vectors + vector;
  add_block(b.row(index, 1) - row, vectors, total, b.vectors, pixels);
}

// One block of the result to where it belongs.
template <typename V, typename T>
void write(const ai3_args* a, const Blocks& b, int64_t index) {
  const GradientSizes& s = b.s;
  const int64_t group = b.matrix(index) / s.taps, tap = b.matrix(index) % s.taps, *stride = a->output.stride;
  T* to = static_cast<T*>(a->output.data) + group * s.group_filters * stride[0] + tap / a->kernel_w * stride[2] +
          tap % a->kernel_w * stride[3];
  const int64_t row_stride = stride[b.image_in_vectors ? 0 : 1], channel_stride = stride[b.image_in_vectors ? 1 : 0];
  for (int64_t row = b.row(index); row < b.row(index, 1); ++row) {
    for (int64_t v = b.vector(index); v < b.vector(index, 1); ++v) {
      const V total = static_cast<const V*>(a->workspace)[(b.matrix(index) * b.rows + row) * b.vectors + v];
      T values[sizeof(V) / sizeof(T)];
      memcpy(values, &total, sizeof total);
      // What the vector ahead has is written there.
      for (int64_t lane = v * b.lanes - b.start(v); lane < b.lanes; ++lane)
        to[row * row_stride + (b.start(v) + lane) * channel_stride] = values[lane];
    }
  }
}

// Every pixel for some blocks: as many at a time as stay in cache, and are summed in registers.
template <typename V, typename T>
void run_blocks(const ai3_args* a, const Blocks& b, int64_t begin, int64_t end) {
  const GradientSizes& s = b.s;
  for (int64_t index = begin; index < end; ++index) {
    for (int64_t row = b.row(index); row < b.row(index, 1); ++row) {
      V* total = static_cast<V*>(a->workspace) + (b.matrix(index) * b.rows + row) * b.vectors;
      std::fill(total + b.vector(index), total + b.vector(index, 1), V{});
    }
  }
  const int64_t columns = std::max<int64_t>(1, std::min(s.out_width, ai3::kSumSteps)), lines = ai3::kSumSteps / columns;
  for (int64_t image = 0; image < s.images; ++image) {
    for (int64_t top = 0; top < s.out_height; top += lines) {
      for (int64_t left = 0; left < s.out_width; left += columns) {
        for (int64_t index = begin; index < end; ++index) {
          add_pixels<V, T>(a, b, index, image, top, std::min(s.out_height, top + lines), left,
                           std::min(s.out_width, left + columns));
        }
      }
    }
  }
  for (int64_t index = begin; index < end; ++index) write<V, T>(a, b, index);
}

// A vector of channels and a row of taps of a depthwise convolution.
template <typename V, typename T>
void depthwise_row(const ai3_args* a, const GradientSizes& s, int64_t vector, int64_t r) {
  constexpr int64_t lanes = sizeof(V) / sizeof(T), kTaps = 8, kSums = 4;
  const int64_t channel = std::min(vector * lanes, s.channels - lanes), down = r * a->dilation_h - a->pad_top;
  const Span lines(0, s.out_height, a->stride_h, down, 0, s.height);
  const int64_t step = a->stride_w * s.channels;
  for (int64_t first = 0; first < a->kernel_w; first += kTaps) {
    const int64_t taps = std::min(kTaps, a->kernel_w - first);
    V total[kTaps] = {};
    for (int64_t line = 0; line < s.images * (lines.last - lines.first); ++line) {
      const int64_t image = line / (lines.last - lines.first), p = lines.first + line % (lines.last - lines.first);
      const T* gradient = static_cast<const T*>(a->key.data) + (image * s.out_height + p) * s.out_width * s.filters;
      const T* row =
          static_cast<const T*>(a->input.data) + (image * s.height + p * a->stride_h + down) * s.width * s.channels;
      for (int64_t x = 0; x < taps; ++x) {
        const int64_t along = (first + x) * a->dilation_w - a->pad_left;
        const Span columns(0, s.out_width, a->stride_w, along, 0, s.width);
        const T* y = gradient + columns.first * s.filters + channel;
        const T* z = row + (columns.first * a->stride_w + along) * s.channels + channel;
        V sum[kSums] = {};
        int64_t left = columns.last - columns.first;
        for (; left >= kSums; left -= kSums, y += kSums * s.filters, z += kSums * step) {
#pragma GCC unroll 4
          for (int i = 0; i < kSums; ++i) sum[i] += ai3::load<V>(y + i * s.filters) * ai3::load<V>(z + i * step);
        }
        for (int64_t i = 0; i < left; ++i) sum[0] += ai3::load<V>(y + i * s.filters) * ai3::load<V>(z + i * step);
        total[x] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
      }
    }
    for (int64_t x = 0; x < taps; ++x) {
      T values[lanes];
      memcpy(values, &total[x], sizeof values);
      for (int64_t lane = vector * lanes - channel; lane < lanes; ++lane) {
        static_cast<T*>(a->output.data)[(channel + lane) * a->output.stride[0] + r * a->output.stride[2] +
                                        (first + x) * a->output.stride[3]] = values[lane];
      }
    }
  }
}

template <typename V, typename T>
void run_range(void* arg, int64_t begin, int64_t end) {
  const auto* a = static_cast<const ai3_args*>(arg);
  const GradientSizes s = ai3::weight_gradient_sizes(a);
  if (!s.is_depthwise()) return run_blocks<V, T>(a, Blocks(a, sizeof(V) / sizeof(T)), begin, end);
  for (int64_t item = begin; item < end; ++item) depthwise_row<V, T>(a, s, item / a->kernel_h, item % a->kernel_h);
}

// Calls f with the vectors that the longer side of a group fills, or the channels of a depthwise convolution.
template <typename F>
void with_vectors(const ai3_args* a, const F& f) {
  const GradientSizes s = ai3::weight_gradient_sizes(a);
  const int64_t channels = s.is_depthwise() ? s.channels : Blocks::channels_of(s);
  if (a->dtype == AI3_FLOAT64)
    ai3::with_channels<double>(channels, [&](auto v) { f(v, double()); });
  else
    ai3::with_channels<float>(channels, [&](auto v) { f(v, float()); });
}

size_t workspace_bytes(const ai3_args* a) {
  size_t bytes = 0;
  with_vectors(a, [&](auto v, auto element) {
    const Blocks b(a, sizeof v / sizeof element);
    if (!b.s.is_depthwise()) bytes = size_t(b.s.groups * b.s.taps * b.rows * b.vectors) * sizeof v;
  });
  return bytes;
}

void run(const ai3_args* a) {
  ai3::gradient_check(a, ai3::weight_gradient_sizes(a), a->input, a->key);
  assert(a->output.data && (a->workspace || !workspace_bytes(a)));
  with_vectors(a, [&](auto v, auto element) {
    const Blocks b(a, sizeof v / sizeof element);
    const int64_t items = b.s.is_depthwise() ? ai3::ceil_div(b.s.channels, b.lanes) * a->kernel_h : b.count();
    a->runtime->parallel_for(items, run_range<decltype(v), decltype(element)>, const_cast<ai3_args*>(a));
  });
}

double cost(const ai3_args* a) {
  const GradientSizes s = ai3::weight_gradient_sizes(a);
  if (s.is_depthwise()) return s.computed(80) + s.moved();
  double time = 0;
  with_vectors(a, [&](auto v, auto element) {
    const Blocks b(a, sizeof v / sizeof element);
    const double few_rows = 1 + 1.0 / double(std::max<int64_t>(1, b.rows));
    time = s.computed(85) * s.padded(b.channels) * few_rows + s.moved();
  });
  return time;
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d.grad_weight",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = AI3_NHWC,
                           .supports = ai3::gradient_supports,
                           .cost = cost,
                           .workspace_bytes = workspace_bytes,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
