// Winograd's convolution of channels_last images by tiles of outputs: its stages, and how threads share them.
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv 1509.09308; a block of
// tiles goes through all stages while in cache, after Gelashvili et al., "L3 Fusion", arXiv 1912.02165.
//
// Stages for a block of tiles: the input transform writes V [frequency][tile][channel]; for each panel of output
// channels a matrix product a frequency gives [frequency][tile][channel of the panel], which the output transform turns
// into pixels. Threads own blocks of tiles, or, where blocks are few or the weights large, share one block's V and
// split the panels. Weights are packed [group][panel][frequency][channel][channel of the panel].
#ifndef AI3_WINOGRAD_CONV_H
#define AI3_WINOGRAD_CONV_H

#include <algorithm>
#include <cassert>

#include "ai3/kernel.h"
#include "ai3/winograd_tile.h"

namespace ai3 {

constexpr int64_t kBlockBytes = 1000 * 1024;  // of V and the products, which stay in L2
// Tiles of a block. With fewer than kMinBlock the weights, which stream from L3 once a block, are what takes the time.
constexpr int64_t kMinBlock = 30, kMaxBlock = 96;
constexpr double kStreamedBytes = 8e6;  // of weights that are better read once by all threads together

inline const char* winograd_supports(const ai3_args* a) {
  if (a->stride_h != 1 || a->stride_w != 1) return "needs stride 1";
  if (a->dilation_h != 1 || a->dilation_w != 1) return "needs dilation 1";
  return conv_supports(a);
}

// `m` outputs a side of a tile, along each side of the kernel that has several taps.
inline WinogradShape winograd_shape(const ai3_args* a, int64_t m) {
  const int64_t bytes = a->dtype == AI3_FLOAT64 ? 8 : 4, lanes = kVectorBytes / bytes;
  const int64_t panel = kPanelVectors * lanes;
  const int64_t threads = a->runtime ? std::max(1, a->runtime->num_threads) : 1;
  WinogradShape s{};
  s.tile_height = a->kernel_h > 1 ? m : 1;
  s.tile_width = a->kernel_w > 1 ? m : 1;
  s.frequencies = (s.tile_height + a->kernel_h - 1) * (s.tile_width + a->kernel_w - 1);
  s.channels = a->weight.size[1];
  s.filters = a->weight.size[0] / std::max<int64_t>(1, a->groups);
  s.panels = ceil_div(s.filters, panel);
  s.width = ceil_div(s.filters, panel / 2) * (panel / 2);
  s.tile_rows = ceil_div(a->output.size[2], s.tile_height);
  s.tile_columns = ceil_div(a->output.size[3], s.tile_width);
  s.tiles = a->output.size[0] * s.tile_rows * s.tile_columns;
  // Rows are padded and planes are an odd number of cache lines apart, as powers of two would share cache sets.
  s.row = ceil_div(s.channels, lanes) * lanes + lanes;
  const int64_t tile_bytes = s.frequencies * (s.row + panel) * bytes;
  const int64_t fit = std::clamp(kBlockBytes / tile_bytes, kMinBlock, kMaxBlock);
  const double weight_bytes = double(s.frequencies) * double(s.channels) * double(s.filters) * double(bytes);
  s.share = a->groups == 1 && s.panels >= threads &&
            (weight_bytes > kStreamedBytes || (threads > 1 && s.tiles < threads * kBlockRows));
  s.blocks =
      s.share ? ceil_div(s.tiles, kMaxBlock) : std::min(s.tiles, ceil_div(ceil_div(s.tiles, fit), threads) * threads);
  s.block = ceil_div(s.tiles, std::max<int64_t>(1, s.blocks));
  s.blocks = ceil_div(s.tiles, std::max<int64_t>(1, s.block));
  s.plane = (s.block * s.row / lanes | 1) * lanes;
  s.result_plane = s.block * panel + lanes;
  s.v_elements = s.frequencies * s.plane;
  s.result_elements = s.frequencies * s.result_plane;
  s.slots = std::min(threads, s.share ? s.panels : s.blocks);
  s.slot_panels = s.share ? ceil_div(s.panels, std::max<int64_t>(1, s.slots)) : 1;
  return s;
}

inline size_t winograd_workspace_bytes(const ai3_args* a, int64_t m) {
  const WinogradShape s = winograd_shape(a, m);
  const int64_t elements = (s.share ? 1 : s.slots) * s.v_elements + s.slots * s.slot_panels * s.result_elements;
  return size_t(elements * (a->dtype == AI3_FLOAT64 ? 8 : 4));
}

inline size_t winograd_packed_bytes(const ai3_args* a, int64_t m) {
  const WinogradShape s = winograd_shape(a, m);
  return size_t(a->groups * s.frequencies * s.channels * s.width * (a->dtype == AI3_FLOAT64 ? 8 : 4));
}

template <typename Tile>
void winograd_pack(const ai3_args* a, void* dst) {
  assert(a->weight.data && dst && Tile::fits(a) && !winograd_supports(a));
  const WinogradShape s = winograd_shape(a, Tile::kOutputs);
  if (a->dtype == AI3_FLOAT64) return Tile::weights(a, s, static_cast<double*>(dst));
  Tile::weights(a, s, static_cast<float*>(dst));
}

template <typename Tile, typename T>
struct WinogradConv {
  // What one parallel_for works on.
  struct Work {
    const ai3_args* args;
    WinogradShape shape;
    int64_t block;  // with a shared V
  };

  static void run(const ai3_args* a) {
    Work w{a, winograd_shape(a, Tile::kOutputs), 0};
    if (!w.shape.share) return a->runtime->parallel_for(w.shape.slots, run_blocks, &w);
    for (; w.block < w.shape.blocks; ++w.block) {
      a->runtime->parallel_for(std::min(w.shape.block, w.shape.tiles - w.block * w.shape.block), share_input, &w);
      a->runtime->parallel_for(w.shape.slots, share_panels, &w);
    }
  }

 private:
  static T* shared_v(const Work& w) { return static_cast<T*>(w.args->workspace); }

  static T* slot_results(const Work& w, int64_t slot) {
    const WinogradShape& s = w.shape;
    return shared_v(w) + (s.share ? s.v_elements : s.slots * s.v_elements) + slot * s.slot_panels * s.result_elements;
  }

  // Panels [begin, end) of output channels for a block of tiles, from V to pixels. A frequency's V is read by all
  // panels while it is in cache.
  static void run_panels(const Work& w, int64_t group, int64_t begin, int64_t end, int64_t first, int64_t tiles,
                         const T* v, T* results) {
    const WinogradShape& s = w.shape;
    constexpr int64_t columns = kPanelColumns<T>;
    const auto width = [&](int64_t panel) { return std::min(columns, s.width - panel * columns); };
    const auto weights = [&](int64_t panel, int64_t f) {
      return static_cast<const T*>(w.args->packed) + s.frequencies * s.channels * (group * s.width + panel * columns) +
             f * s.channels * width(panel);
    };
    for (int64_t f = 0; f < s.frequencies; ++f) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const T *b = weights(panel, f), *next = panel + 1 < end ? weights(panel + 1, f) : weights(begin, f + 1);
        T* products = results + (panel - begin) * s.result_elements + f * s.result_plane;
        if (width(panel) == columns)
          multiply_tiles<kPanelVectors>(v + f * s.plane, s.row, b, s.channels, tiles, products, columns, next);
        else
          multiply_tiles<kPanelVectors / 2>(v + f * s.plane, s.row, b, s.channels, tiles, products, columns, next);
      }
    }
    for (int64_t panel = begin; panel < end; ++panel, results += s.result_elements) {
      const int64_t filter = panel * columns, filters = std::min(columns, s.filters - filter);
      for (int64_t t = 0; t < tiles; ++t)
        Tile::output(w.args, s, group * s.filters + filter, filters, width(panel), first + t, results + t * columns);
    }
  }

  static void run_blocks(void* arg, int64_t begin, int64_t end) {
    const Work& w = *static_cast<const Work*>(arg);
    const WinogradShape& s = w.shape;
    for (int64_t slot = begin; slot < end; ++slot) {
      T *v = shared_v(w) + slot * s.v_elements, *results = slot_results(w, slot);
      for (int64_t block = slot * s.blocks / s.slots; block < (slot + 1) * s.blocks / s.slots; ++block) {
        const int64_t first = block * s.block, tiles = std::min(s.block, s.tiles - first);
        for (int64_t group = 0; group < w.args->groups; ++group) {
          for (int64_t t = 0; t < tiles; ++t) Tile::input(w.args, s, group, first + t, v + t * s.row);
          for (int64_t panel = 0; panel < s.panels; ++panel)
            run_panels(w, group, panel, panel + 1, first, tiles, v, results);
        }
      }
    }
  }

  static void share_input(void* arg, int64_t begin, int64_t end) {
    const Work& w = *static_cast<const Work*>(arg);
    for (int64_t t = begin; t < end; ++t)
      Tile::input(w.args, w.shape, 0, w.block * w.shape.block + t, shared_v(w) + t * w.shape.row);
  }

  static void share_panels(void* arg, int64_t begin, int64_t end) {
    const Work& w = *static_cast<const Work*>(arg);
    const WinogradShape& s = w.shape;
    const int64_t first = w.block * s.block, tiles = std::min(s.block, s.tiles - first);
    for (int64_t slot = begin; slot < end; ++slot)
      run_panels(w, 0, slot * s.panels / s.slots, (slot + 1) * s.panels / s.slots, first, tiles, shared_v(w),
                 slot_results(w, slot));
  }
};

template <typename Tile>
void winograd_run(const ai3_args* a) {
  assert(a->input.data && a->output.data && a->packed && a->workspace && a->runtime);
  assert(Tile::fits(a) && !winograd_supports(a));
  assert(a->weight.size[1] > 0 && a->groups > 0 && a->input.size[1] == a->weight.size[1] * a->groups);
  assert(!a->has_bias == !a->bias && !a->has_residual == !a->residual.data);
  if (a->dtype == AI3_FLOAT64) return WinogradConv<Tile, double>::run(a);
  WinogradConv<Tile, float>::run(a);
}

}  // namespace ai3
#endif
