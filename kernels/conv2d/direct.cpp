// Direct convolution on channels_last images: register blocks along an output row, clipped at the borders; no lowering.
// Source: Zhang, Franchetti and Low, "High Performance Zero-Memory Overhead Direct Convolutions", ICML 2018, arXiv
// 1809.10170, with channels innermost. Depthwise convolutions take a second path, which runs along the channels, and
// first layers a third.
#include <cmath>

#include "ai3/conv2d.h"
#include "ai3/depthwise.h"
#include "ai3/pixel_block.h"
#include "ai3/stem.h"

namespace {

using ai3::ConvSizes;
using ai3::kLanes;
using ai3::Taps;
using ai3::Vec;

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
        ai3::add_segment<N, T>(total, pixels + left * s.channels, count, pixel_stride, a->kernel_w * steps, b);
        continue;
      }
      for (int64_t x = 0; x < a->kernel_w; ++x, b += tap_size) {
        const int64_t start = left + x * a->dilation_w;
        const Taps valid(start, count, a->stride_w, s.width);
        ai3::add_segment<N, T>(total + valid.first * N, pixels + start * s.channels + valid.first * pixel_stride,
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
          std::max<int64_t>(1, a->runtime ? a->runtime->num_threads : 1)};
}

template <typename T>
void run_slot(const ai3_args* a, const ai3::WorkSplit& shares, int64_t slot) {
  if (ai3::is_stem(a)) return ai3::stem_slot<T>(a, shares, slot);
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

template <typename T>
void run_as(const ai3_args* a) {
  if (ai3::is_depthwise(a)) return ai3::depthwise_run<T>(a);
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

size_t workspace_bytes(const ai3_args* a) {
  if (ai3::is_depthwise(a) || !ai3::is_stem(a)) return 0;
  const ai3::WorkSplit shares = a->dtype == AI3_FLOAT64 ? split<double>(a) : split<float>(a);
  return size_t(shares.slots() * ai3::stem_slot_bytes(a));
}

void run(const ai3_args* a) {
  ai3::conv_check(a);
  assert(a->workspace || !workspace_bytes(a));
  if (a->dtype == AI3_FLOAT64) return run_as<double>(a);
  run_as<float>(a);
}

size_t packed_bytes(const ai3_args* a) {
  return (ai3::is_depthwise(a) ? ai3::depthwise_packed_bytes : ai3::conv_packed_bytes)(a);
}

void pack(const ai3_args* a, void* dst) { (ai3::is_depthwise(a) ? ai3::depthwise_pack : ai3::conv_pack)(a, dst); }

double cost(const ai3_args* a) {
  if (ai3::is_depthwise(a)) return ai3::depthwise_cost(a);
  const bool adjacent = a->dilation_w == 1 && a->groups == 1;
  if (ai3::is_stem(a)) return ai3::conv_cost(a, 0, a->weight.size[1] * a->kernel_w, 1);
  // The last block of an output row has fewer pixels: 7 take 18 % longer than as rows of a longer matrix, 28 4 %.
  const double width = double(std::max<int64_t>(1, a->output.size[3]));
  const double blocks = std::ceil(width / ai3::kBlockRows) * ai3::kBlockRows;
  return ai3::conv_cost(a, 0, a->weight.size[1] * (adjacent ? a->kernel_w : 1), 3) * (0.75 + 0.25 * blocks / width);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "direct",
                           .version = 3,
                           .flags = AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_OUTPUT,
                           .supports = ai3::conv_supports,
                           .cost = cost,
                           .workspace_bytes = workspace_bytes,
                           .packed_bytes = packed_bytes,
                           .pack = pack,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
