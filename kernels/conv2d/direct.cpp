// Direct convolution on channels_last images: register blocks along an output row, clipped at the borders; no lowering.
// Source: Zhang, Franchetti and Low, "High Performance Zero-Memory Overhead Direct Convolutions", ICML 2018, arXiv
// 1809.10170, with channels innermost. Depthwise convolutions take a second path, which runs along the channels.
#include "ai3/conv2d.h"

namespace {

using ai3::ConvSizes;
using ai3::kLanes;
using ai3::Vec;

bool is_depthwise(const ai3_args* a) {
  return a->groups > 1 && a->groups == a->input.size[1] && a->groups == a->output.size[1];
}

// The taps first, ..., last - 1 of a window that read inside [0, size), where tap t reads start + t * dilation.
struct Taps {
  int64_t first, last;
  Taps(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
    first = start >= 0 ? 0 : std::min(kernel, ai3::ceil_div(-start, dilation));
    last = start >= size ? first : std::max(first, std::min(kernel, ai3::ceil_div(size - start, dilation)));
  }
};

// total[M][N] += the products of M pixels, `stride` apart, with `steps` rows of a panel.
template <int M, int N, typename T>
void add_pixels(Vec<T>* total, const T* pixels, int64_t stride, int64_t steps, const T* b) {
  const T* a[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) a[m] = pixels + m * stride;
  while (steps > 0) {
    const int64_t now = std::min(steps, ai3::kSumSteps);
    Vec<T> sum[M][N] = {};
    ai3::multiply_add<M, N, T>(sum, a, now, b);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      a[m] += now;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) total[m * N + n] += sum[m][n];
    }
    b += now * N * kLanes<T>;
    steps -= now;
  }
}

template <int N, typename T>
void add_segment(Vec<T>* total, const T* pixels, int64_t count, int64_t stride, int64_t steps, const T* b) {
  if (count == ai3::kBlockRows) return add_pixels<ai3::kBlockRows, N, T>(total, pixels, stride, steps, b);
  for (; count >= 4; count -= 4, total += 4 * N, pixels += 4 * stride)
    add_pixels<4, N, T>(total, pixels, stride, steps, b);
  for (; count >= 2; count -= 2, total += 2 * N, pixels += 2 * stride)
    add_pixels<2, N, T>(total, pixels, stride, steps, b);
  if (count > 0) add_pixels<1, N, T>(total, pixels, stride, steps, b);
}

// One output row (`line` counts them over all images) and one panel of one group.
template <int N, typename T>
void run_row(const ai3_args* a, const ConvSizes& s, int64_t line, int64_t group, const T* packed, ai3::Target<T> to) {
  const int64_t top = line % s.out_height * a->stride_h - a->pad_top, steps = s.group_channels;
  const Taps rows(top, a->kernel_h, a->dilation_h, s.height);
  const T* image = static_cast<const T*>(a->input.data) + line / s.out_height * s.height * s.width * s.channels +
                   group * s.group_channels;
  const int64_t tap_size = steps * N * kLanes<T>, pixel_stride = a->stride_w * s.channels;
  const bool adjacent = a->dilation_w == 1 && s.groups == 1;  // the taps of a kernel row, inside the image
  for (int64_t q = 0; q < s.out_width; q += ai3::kBlockRows) {
    const int64_t count = std::min<int64_t>(ai3::kBlockRows, s.out_width - q), left = q * a->stride_w - a->pad_left;
    const bool inside = left >= 0 && left + (count - 1) * a->stride_w + (a->kernel_w - 1) * a->dilation_w < s.width;
    Vec<T> total[ai3::kBlockRows * N] = {};
    for (int64_t r = rows.first; r < rows.last; ++r) {
      const T* pixels = image + (top + r * a->dilation_h) * s.width * s.channels;
      const T* b = packed + r * a->kernel_w * tap_size;
      if (inside && adjacent) {
        add_segment<N, T>(total, pixels + left * s.channels, count, pixel_stride, a->kernel_w * steps, b);
        continue;
      }
      for (int64_t x = 0; x < a->kernel_w; ++x, b += tap_size) {
        const int64_t start = left + x * a->dilation_w;
        const Taps valid(start, count, a->stride_w, s.width);
        add_segment<N, T>(total + valid.first * N, pixels + start * s.channels + valid.first * pixel_stride,
                          valid.last - valid.first, pixel_stride, steps, b);
      }
    }
    ai3::write_rows<T>(total, count, N, to);
    to.out += count * to.stride;
    if (to.residual) to.residual += count * to.stride;
  }
}

template <typename T>
ai3::WorkSplit split(const ai3_args* a) {
  const ConvSizes s(a);
  const int64_t panels = ai3::Panels<T>(s.group_filters).count * s.groups;
  const double width = double(s.filters) / double(std::max<int64_t>(1, panels)), depth = double(s.depth);
  return {s.images * s.out_height,
          panels,
          double(s.out_width) * width * depth * double(s.bytes) / 4,
          double(a->stride_h * s.width * s.channels * s.bytes),
          width * depth * double(s.bytes),
          std::max<int64_t>(1, a->runtime->num_threads)};
}

template <typename T>
void run_slot(const ai3_args* a, const ai3::WorkSplit& shares, int64_t slot) {
  const ConvSizes s(a);
  const ai3::Panels<T> panels(s.group_filters);
  const ai3::WorkSplit::Part part = shares.part(slot, s.images * s.out_height, panels.count * s.groups);
  const auto one = [&](int64_t line, int64_t index) {
    const int64_t group = index / panels.count, p = index % panels.count;
    const T* packed = static_cast<const T*>(a->packed) + group * panels.elements(s.depth) + panels.first(p) * s.depth;
    const auto to =
        ai3::conv_target<T>(a, line * s.out_width, group * s.group_filters + panels.first(p), panels.used(p));
    ai3::with_vectors<T>(panels.width(p),
                         [&](auto n) { run_row<decltype(n)::value, T>(a, s, line, group, packed, to); });
  };
  // Panels that fit no cache together are each read once, and the input again for every panel.
  constexpr int64_t kPanelBytes = 1 << 20;
  if ((part.panel_end - part.panel_begin) * panels.width(0) * s.depth * s.bytes > kPanelBytes) {
    for (int64_t i = part.panel_begin; i < part.panel_end; ++i) {
      for (int64_t line = part.unit_begin; line < part.unit_end; ++line) one(line, i);
    }
  } else {
    for (int64_t line = part.unit_begin; line < part.unit_end; ++line) {
      for (int64_t i = part.panel_begin; i < part.panel_end; ++i) one(line, i);
    }
  }
}

// M pixels and N vectors (or scalars) V of channels, all of whose taps rows x columns lie inside the image.
template <int M, int N, typename V, typename T>
void depthwise_block(const ai3_args* a, const T* window, const T* weight, Taps rows, Taps columns, int64_t channel,
                     int64_t at) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  const int64_t channels = a->input.size[1], row_stride = a->dilation_h * a->input.size[3] * channels;
  V sum[M][N];
  const T* bias = static_cast<const T*>(a->bias);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const V start = bias ? ai3::load<V>(bias + channel + n * lanes) : V{};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[m][n] = start;
  }
  for (int64_t r = rows.first; r < rows.last; ++r) {
    for (int64_t x = columns.first; x < columns.last; ++x) {
      const T* pixel = window + r * row_stride + x * a->dilation_w * channels;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const V w = ai3::load<V>(weight + (r * a->kernel_w + x) * channels + n * lanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sum[m][n] += w * ai3::load<V>(pixel + m * a->stride_w * channels + n * lanes);
      }
    }
  }
  T* out = static_cast<T*>(a->output.data) + at;
  const T* residual = static_cast<const T*>(a->residual.data);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const int64_t offset = m * channels + n * lanes;
      const V value = residual ? sum[m][n] + ai3::load<V>(residual + at + offset) : sum[m][n];
      ai3::store(out + offset, a->activation == AI3_RELU ? ai3::relu(value) : value);
    }
  }
}

constexpr int64_t kChannels = 128;

// Items are output rows, within blocks of channels.
template <typename T>
void depthwise_range(void* arg, int64_t begin, int64_t end) {
  const auto* a = static_cast<const ai3_args*>(arg);
  const ConvSizes s(a);
  constexpr int lanes = kLanes<T>, kPixels = 4;
  const int64_t blocks = ai3::ceil_div(s.channels, kChannels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t p = item % s.out_height, block = item / s.out_height % blocks, image = item / s.out_height / blocks;
    const int64_t top = p * a->stride_h - a->pad_top, channel_end = std::min(s.channels, (block + 1) * kChannels);
    const Taps rows(top, a->kernel_h, a->dilation_h, s.height);
    const T* line = static_cast<const T*>(a->input.data) + (image * s.height + top) * s.width * s.channels;
    for (int64_t q = 0; q < s.out_width;) {
      const int64_t left = q * a->stride_w - a->pad_left;
      const Taps columns(left, a->kernel_w, a->dilation_w, s.width);
      const bool wide = q + kPixels <= s.out_width && left >= 0 &&
                        left + (kPixels - 1) * a->stride_w + (a->kernel_w - 1) * a->dilation_w < s.width;
      const int64_t at = ((image * s.out_height + p) * s.out_width + q) * s.channels;
      int64_t c = block * kChannels;
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
  static_assert(kChannels % lanes == 0, "blocks hold whole vectors");
}

template <typename T>
void run_as(const ai3_args* a) {
  if (is_depthwise(a)) {
    const int64_t blocks = ai3::ceil_div(a->input.size[1], kChannels);
    return a->runtime->parallel_for(a->output.size[0] * a->output.size[2] * blocks, depthwise_range<T>,
                                    const_cast<ai3_args*>(a));
  }
  struct Task {
    const ai3_args* args;
    ai3::WorkSplit shares;
  } task{a, split<T>(a)};
  a->runtime->parallel_for(
      task.shares.slots(),
      [](void* arg, int64_t begin, int64_t end) {
        const Task& t = *static_cast<const Task*>(arg);
        for (int64_t slot = begin; slot < end; ++slot) run_slot<T>(t.args, t.shares, slot);
      },
      &task);
}

void run(const ai3_args* a) {
  ai3::conv_check(a);
  if (a->dtype == AI3_FLOAT64) return run_as<double>(a);
  run_as<float>(a);
}

size_t packed_bytes(const ai3_args* a) {
  const ConvSizes s(a);
  return is_depthwise(a) ? size_t(s.taps * s.channels * s.bytes) : ai3::conv_packed_bytes(a);
}

void pack(const ai3_args* a, void* dst) {
  if (!is_depthwise(a)) return ai3::conv_pack(a, dst);
  assert(a->weight.data && dst);
  const ConvSizes s(a);
  // [channel][tap] to [tap][channel]
  for (int64_t tap = 0; tap < s.taps; ++tap) {
    for (int64_t c = 0; c < s.channels; ++c) {
      memcpy(static_cast<char*>(dst) + (tap * s.channels + c) * s.bytes,
             static_cast<const char*>(a->weight.data) + (c * s.taps + tap) * s.bytes, size_t(s.bytes));
    }
  }
}

double cost(const ai3_args* a) {
  if (!is_depthwise(a)) {
    const bool adjacent = a->dilation_w == 1 && a->groups == 1;
    return ai3::conv_cost(a, 0, a->weight.size[1] * (adjacent ? a->kernel_w : 1), 3);
  }
  const ConvSizes s(a);
  const double outputs = double(s.rows) * double(s.filters),
               image = double(s.images * s.channels) * double(s.height * s.width);
  return (2 * outputs * double(s.taps) / 50 + (image + outputs) / 5) * double(s.bytes) / 4;
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = AI3_NHWC | AI3_EPILOGUE,
                           .supports = ai3::conv_supports,
                           .cost = cost,
                           .packed_bytes = packed_bytes,
                           .pack = pack,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
