// What the convolutions on channels_last images share: sizes, packed weights, and the walk over blocks of output
// pixels. The output is a matrix [N*P*Q][K], its rows the pixels; the weight a matrix [R*S*C/groups][K/groups] for each
// group.
#ifndef AI3_CONV2D_H
#define AI3_CONV2D_H

#include <cassert>
#include <cstring>

#include "ai3/gemm.h"
#include "ai3/kernel.h"

namespace ai3 {

struct ConvSizes {
  int64_t images, channels, height, width, filters, out_height, out_width, pixels, rows;
  int64_t groups, group_channels, group_filters, taps, depth, bytes;  // bytes of an element

  explicit ConvSizes(const ai3_args* a)
      : images(a->input.size[0]),
        channels(a->input.size[1]),
        height(a->input.size[2]),
        width(a->input.size[3]),
        filters(a->output.size[1]),
        out_height(a->output.size[2]),
        out_width(a->output.size[3]),
        pixels(out_height * out_width),
        rows(images * pixels),
        groups(std::max<int64_t>(1, a->groups)),
        group_channels(channels / groups),
        group_filters(filters / groups),
        taps(a->kernel_h * a->kernel_w),
        depth(group_channels * taps),
        bytes(a->dtype == AI3_FLOAT64 ? 8 : 4) {}
};

inline const char* conv_supports(const ai3_args* a) {
  return a->dtype == AI3_FLOAT32 || a->dtype == AI3_FLOAT64 ? nullptr : "needs float32 or float64";
}

// True where the pixels of the input are the rows of the left-hand matrix.
inline bool conv_is_pointwise(const ai3_args* a) {
  return a->kernel_h * a->kernel_w == 1 && a->stride_h == 1 && a->stride_w == 1 && a->pad_top == 0 &&
         a->pad_bottom == 0 && a->pad_left == 0 && a->pad_right == 0;
}

// Nanoseconds. `row_bytes`: written to lower one row; `segment`: the steps between two looks at the table of addresses,
// each of which costs as much as `overhead` steps.
inline double conv_cost(const ai3_args* a, double row_bytes, int64_t segment, double overhead) {
  const ConvSizes s(a);
  const int64_t lanes = kVectorBytes / s.bytes;
  const double padded = double(ceil_div(s.group_filters, lanes) * lanes) * double(s.groups);
  // A register block of one vector or few steps waits for its loads and its latency.
  const double vectors = std::min<double>(kPanelVectors, double(s.group_filters) / double(lanes));
  const double wait = (1 + overhead / double(std::max<int64_t>(1, segment))) / std::min(1.0, 0.4 + 0.2 * vectors);
  const double compute = 2 * double(s.rows) * padded * double(s.depth) * double(s.bytes) / 4 / 85;
  const double image = double(s.images) * double(s.channels) * double(s.height) * double(s.width);
  const double moved = image + double(s.rows) * double(s.filters) + double(s.filters) * double(s.depth);
  return compute * wait + (moved * double(s.bytes) + 2 * double(s.rows) * row_bytes) / 20;
}

// The weight [K][C/groups][R][S] as one packed matrix a group, its rows in the order r, s, c.
inline size_t conv_packed_bytes(const ai3_args* a) {
  const ConvSizes s(a);
  const int64_t each = s.bytes == 8 ? Panels<double>(s.group_filters).elements(s.depth)
                                    : Panels<float>(s.group_filters).elements(s.depth);
  return size_t(s.groups * each * s.bytes);
}

template <typename T>
void conv_pack_as(const ai3_args* a, T* dst) {
  const ConvSizes s(a);
  const Panels<T> panels(s.group_filters);
  for (int64_t g = 0; g < s.groups; ++g, dst += panels.elements(s.depth)) {
    const T* weight = static_cast<const T*>(a->weight.data) + g * s.group_filters * s.depth;
    panels.pack(s.depth, s.depth, dst,
                [&](int64_t k) { return weight + k % s.group_channels * s.taps + k / s.group_channels; });
  }
}

inline void conv_pack(const ai3_args* a, void* dst) {
  assert(a->weight.data && dst && !conv_supports(a));
  if (a->dtype == AI3_FLOAT64) return conv_pack_as(a, static_cast<double*>(dst));
  conv_pack_as(a, static_cast<float*>(dst));
}

inline void conv_check(const ai3_args* a) {
  assert(a->input.ndim == 4 && a->output.ndim == 4 && a->input.data && a->output.data && a->packed && a->runtime);
  assert(a->input.size[0] == a->output.size[0] && a->input.size[1] == a->weight.size[1] * a->groups);
  assert(a->output.size[1] == a->weight.size[0] && a->weight.size[0] % a->groups == 0 && !conv_supports(a));
  assert(a->input.size[1] == 1 || a->input.stride[1] == 1);
  assert(a->output.size[1] == 1 || a->output.stride[1] == 1);
  (void)a;
}

// Elements between two pixels of the input: more than its channels where it is a slice of a larger image.
inline int64_t input_pixel_stride(const ai3_args* a) {
  assert(a->input.stride[3] >= a->input.size[1]);
  return a->input.stride[3];
}

// Elements between two pixels of the output: more than its channels where it is a slice of a larger image.
inline int64_t output_pixel_stride(const ai3_args* a) {
  assert(a->output.stride[3] >= a->output.size[1]);
  assert(a->output.stride[3] == a->output.size[1] || !a->residual.data);
  return a->output.stride[3];
}

// Where output row `row` and the filters from `filter` of a group go.
template <typename T>
Target<T> conv_target(const ai3_args* a, int64_t row, int64_t filter, int64_t columns) {
  const int64_t stride = output_pixel_stride(a), at = row * stride + filter;
  const T* residual = static_cast<const T*>(a->residual.data);
  const T* bias = static_cast<const T*>(a->bias);
  return {static_cast<T*>(a->output.data) + at, stride,       columns, bias ? bias + filter : nullptr,
          residual ? residual + at : nullptr,   a->activation};
}

// A conv2d as products of lowered rows with packed panels. Lowering brings the input of some output pixels, for all
// groups, into a slot's scratch; it gives
//   static int64_t row_bytes(a)                       scratch of one row
//   static constexpr int64_t kScratch                 most scratch of one slot
//   static constexpr bool kCheap                      lowering again is cheaper than reading all panels again
//   static int64_t segments(a)                        pieces of a row
//   template <T> static void lower(a, zeros, first, count, pitch, scratch)    rows [first, first + count)
//   template <T> static auto rows(a, first, pitch, scratch, group)            the Rows of gemm()
// where `zeros` is a pixel of zeros and `pitch` the most rows a slot lowers at once.
template <typename Lowering>
struct ConvGemm {
  static constexpr int64_t kMaxRows = 192, kPanelBytes = 1 << 20;

  static int64_t pitch(const ai3_args* a) {
    const int64_t fit = Lowering::kScratch / std::max<int64_t>(1, Lowering::row_bytes(a)) / kBlockRows * kBlockRows;
    return std::max<int64_t>(kBlockRows, std::min(fit, kMaxRows));
  }
  static int64_t zero_bytes(const ai3_args* a) { return ceil_div(a->input.size[1] * 8, 64) * 64; }
  static int64_t slot_bytes(const ai3_args* a) { return ceil_div(pitch(a) * Lowering::row_bytes(a), 64) * 64; }

  template <typename T>
  static WorkSplit split(const ai3_args* a) {
    const ConvSizes s(a);
    const int64_t panels = Panels<T>(s.group_filters).count * s.groups;
    const double width = double(s.filters) / double(std::max<int64_t>(1, panels)), depth = double(s.depth);
    const double row = double(Lowering::row_bytes(a)) + double(s.channels * s.bytes);
    return {ceil_div(s.rows, kBlockRows),
            panels,
            kBlockRows * width * depth * double(s.bytes) / 4,
            kBlockRows * row,
            width * depth * double(s.bytes),
            std::max<int64_t>(1, a->runtime ? a->runtime->num_threads : 1)};
  }

  static size_t workspace_bytes(const ai3_args* a) {
    const WorkSplit shares = a->dtype == AI3_FLOAT64 ? split<double>(a) : split<float>(a);
    return size_t(zero_bytes(a) + shares.slots() * slot_bytes(a));
  }

  template <typename T>
  static void run_slot(const ai3_args* a, const WorkSplit& shares, int64_t slot) {
    const ConvSizes s(a);
    const Panels<T> panels(s.group_filters);
    const int64_t most = pitch(a);
    const WorkSplit::Part part = shares.part(slot, ceil_div(s.rows, kBlockRows), panels.count * s.groups);
    const int64_t row_begin = part.unit_begin * kBlockRows, row_end = std::min(s.rows, part.unit_end * kBlockRows);
    char* const scratch = static_cast<char*>(a->workspace) + zero_bytes(a) + slot * slot_bytes(a);
    int64_t lowered = -1;

    const auto block = [&](int64_t first, int64_t index) {
      const int64_t count = std::min(most, row_end - first), group = index / panels.count, p = index % panels.count;
      if (lowered != first) {
        Lowering::template lower<T>(a, static_cast<const T*>(a->workspace), first, count, most, scratch);
        lowered = first;
      }
      const int64_t segments = Lowering::segments(a);
      const T* packed = static_cast<const T*>(a->packed) + group * panels.elements(s.depth) + panels.first(p) * s.depth;
      gemm<T>(Lowering::template rows<T>(a, first, most, scratch, group), count, segments, s.depth / segments, packed,
              panels.width(p), conv_target<T>(a, first, group * s.group_filters + panels.first(p), panels.used(p)));
    };
    // Panels that fit no cache together are each read once, and the rows again for every panel.
    const int64_t share_bytes = (part.panel_end - part.panel_begin) * panels.width(0) * s.depth * s.bytes;
    if (Lowering::kCheap && share_bytes > kPanelBytes) {
      for (int64_t i = part.panel_begin; i < part.panel_end; ++i) {
        for (int64_t first = row_begin; first < row_end; first += most) block(first, i);
      }
    } else {
      for (int64_t first = row_begin; first < row_end; first += most) {
        for (int64_t i = part.panel_begin; i < part.panel_end; ++i) block(first, i);
      }
    }
  }

  template <typename T>
  static void run_as(const ai3_args* a) {
    struct Task {
      const ai3_args* args;
      WorkSplit shares;
    } task{a, split<T>(a)};
    memset(a->workspace, 0, size_t(zero_bytes(a)));
    a->runtime->parallel_for(
        task.shares.slots(),
        [](void* arg, int64_t begin, int64_t end) {
          const Task& t = *static_cast<const Task*>(arg);
          for (int64_t slot = begin; slot < end; ++slot) run_slot<T>(t.args, t.shares, slot);
        },
        &task);
  }

  static void run(const ai3_args* a) {
    conv_check(a);
    assert(a->workspace);
    if (a->dtype == AI3_FLOAT64) return run_as<double>(a);
    run_as<float>(a);
  }
};

// Lowering to a table of addresses [tap][pitch]; a subclass fills it.
struct ConvPointers {
  static constexpr int64_t kScratch = 64 * 1024;
  static constexpr bool kCheap = true;
  static int64_t row_bytes(const ai3_args* a) { return a->kernel_h * a->kernel_w * int64_t(sizeof(void*)); }
  static int64_t segments(const ai3_args* a) { return a->kernel_h * a->kernel_w; }
  template <typename T>
  static PointerRows<T> rows(const ai3_args* a, int64_t, int64_t pitch, const void* scratch, int64_t group) {
    return {static_cast<const T* const*>(scratch), pitch, group * a->weight.size[1]};
  }
};

}  // namespace ai3
#endif
