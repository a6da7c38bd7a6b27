// What gemm_tile.cuh multiplies, and by which tile and how many shares of the depth: those that a model of the GPU's
// time is shortest for.
#pragma once

#include <ai3/gemm_tile.cuh>
#include <algorithm>
#include <array>
#include <cmath>
#include <map>

namespace ai3 {

// What is multiplied: for each group, `rows` rows of the im2col matrix by `columns` output channels, over the taps of
// the window of `channels` channels each.
struct GemmShape {
  const ai3_args* args;
  int64_t rows, columns, channels, kernel_h, kernel_w, groups, in_pixel, out_pixel;
  bool has_window;  // else the rows are the input's pixels
};

inline int64_t gemm_element_bytes(const ai3_args* a) {
  return a->dtype == AI3_FLOAT64 ? 8 : a->dtype == AI3_FLOAT32 ? 4 : 2;
}

inline const char* gemm_math(const ai3_args* a) {
  if (a->dtype == AI3_FLOAT16) return "float16";
  if (a->dtype == AI3_BFLOAT16) return "bfloat16";
  return a->allow_tf32 ? "tf32" : "float32";
}

inline bool gemm_is_strict(const ai3_args* a) { return a->dtype == AI3_FLOAT32 && !a->allow_tf32; }

// Whether a block of depth is of one tap: its channels are then padded to whole blocks, which copies of whole blocks
// need.
inline bool gemm_one_tap(const GemmShape& s) {
  const int64_t bytes = s.channels * gemm_element_bytes(s.args);
  return s.kernel_h * s.kernel_w == 1 || cuda::ceil_div(bytes, 128) * 128 <= 2 * bytes;
}

// Blocks of depth: of a tap, and of them all.
inline int64_t gemm_tap_blocks(const GemmShape& s) {
  return cuda::ceil_div(s.channels * gemm_element_bytes(s.args), 128);
}
inline int64_t gemm_blocks(const GemmShape& s) {
  if (gemm_one_tap(s)) return s.kernel_h * s.kernel_w * gemm_tap_blocks(s);
  return cuda::ceil_div(s.kernel_h * s.kernel_w * s.channels * gemm_element_bytes(s.args), 128);
}

inline int64_t gemm_packed_columns(const GemmShape& s) { return cuda::ceil_div(s.columns, 32) * 32; }

struct GemmTile {
  int rows, columns, threads, most_resident;  // at most as many tiles on a multiprocessor at once
  const char* name;
};
struct GemmTiles {
  const GemmTile* first;
  int count;
};

// Whether the tensor memory accelerator can bring the input's blocks, but for where it lies.
inline bool gemm_is_bulk(const GemmShape& s) {
  const ai3_args* a = s.args;
  const int64_t bytes = gemm_element_bytes(a);
  if (a->sm != 90 || !gemm_one_tap(s) || s.in_pixel * bytes % 16 != 0) return false;
  if (s.groups > 1 && s.channels * bytes % 128 != 0)
    return false;                           // a block would reach into the next group's channels
  constexpr int64_t kMostPrologues = 4096;  // of channels, whose scales and shifts are to be in shared memory
  if (a->has_prologue && s.channels > kMostPrologues) return false;
  if (!s.has_window) return true;
  const auto fits = [](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad) {
    return pad <= 128 && stride <= 8 && (kernel - 1) * dilation < 256 && (out - 1) * stride - pad - in + 1 >= -128 &&
           (out - 1) * stride - pad - in + 1 < 128;
  };
  return fits(a->input.size[2], a->output.size[2], a->kernel_h, a->stride_h, a->dilation_h, a->pad_top) &&
         fits(a->input.size[3], a->output.size[3], a->kernel_w, a->stride_w, a->dilation_w, a->pad_left);
}

inline GemmTiles gemm_tiles(const GemmShape& s) {
  static constexpr GemmTile kBulk[] = {
      {64, 32, 160, 6, "64x32_bulk"},   {128, 32, 288, 4, "128x32_bulk"},   {64, 64, 160, 5, "64x64_bulk"},
      {64, 128, 160, 4, "64x128_bulk"}, {128, 64, 288, 3, "128x64_bulk"},   {128, 128, 288, 2, "128x128_bulk"},
      {256, 64, 288, 2, "256x64_bulk"}, {256, 128, 288, 1, "256x128_bulk"}, {128, 256, 288, 1, "128x256_bulk"},
  };
  // The rows of float32 go through registers, of which tiles of 256 rows have too few.
  static constexpr GemmTile kTf32Bulk[] = {
      {64, 32, 160, 6, "64x32_bulk"},     {128, 32, 288, 3, "128x32_bulk"}, {64, 64, 160, 5, "64x64_bulk"},
      {64, 128, 160, 3, "64x128_bulk"},   {128, 64, 288, 2, "128x64_bulk"}, {128, 128, 288, 2, "128x128_bulk"},
      {128, 256, 288, 1, "128x256_bulk"},
  };
  static constexpr GemmTile kPrologue[] = {{64, 32, 160, 5, "64x32_prologue"},
                                           {64, 64, 160, 4, "64x64_prologue"},
                                           {64, 128, 160, 3, "64x128_prologue"},
                                           {128, 64, 288, 2, "128x64_prologue"}};
  static constexpr GemmTile kStrictPrologue[] = {{64, 64, 160, 3, "64x64_prologue"},
                                                 {64, 128, 160, 2, "64x128_prologue"}};
  static constexpr GemmTile kStrictBulk[] = {
      {64, 64, 160, 3, "64x64_bulk"}, {64, 128, 160, 2, "64x128_bulk"}, {128, 128, 288, 1, "128x128_bulk"}};
  static constexpr GemmTile kAny[] = {
      {64, 64, 128, 3, "64x64"}, {128, 64, 256, 2, "128x64"}, {128, 128, 256, 2, "128x128"}};
  static constexpr GemmTile kStrictAny[] = {{64, 64, 128, 3, "64x64"}, {128, 64, 256, 1, "128x64"}};
  const bool strict = gemm_is_strict(s.args);
  if (gemm_is_bulk(s)) {
    if (s.args->has_prologue) return strict ? GemmTiles{kStrictPrologue, 2} : GemmTiles{kPrologue, 4};
    if (strict) return {kStrictBulk, 3};
    return s.args->dtype == AI3_FLOAT32 ? GemmTiles{kTf32Bulk, 7} : GemmTiles{kBulk, 9};
  }
  if (s.args->sm == 90) return {kAny, 1};
  return strict ? GemmTiles{kStrictAny, 2} : GemmTiles{kAny, 3};
}

struct GemmChoice {
  const GemmTile* tile;
  int splits, stages, slots, ahead, shared;
  double time;  // nanoseconds
};

inline int gemm_shared_limit(int sm) {
  if (sm == 80 || sm == 87) return 163 * 1024;
  return sm >= 90 && sm < 120 ? 227 * 1024 : 99 * 1024;
}

// With as much of the depth in shared memory as leaves room for `resident` tiles; no tile where nothing does.
inline GemmChoice gemm_choice(const GemmShape& s, const GemmTile& tile, int splits, int resident) {
  const bool strict = gemm_is_strict(s.args), bulk = tile.threads % 64 != 0;
  const int bytes = (tile.rows + tile.columns * (strict ? 2 : 1)) * 128;
  const int depth = int(cuda::ceil_div(gemm_blocks(s), splits)), limit = gemm_shared_limit(s.args->sm);
  const int prologue = s.args->has_prologue ? depth * int(128 / gemm_element_bytes(s.args)) * 8 : 0;
  const int beside_blocks = bulk ? kBulkBarriers + prologue : 2048;
  const int exchanged = splits > 1 || s.args->activation > AI3_RELU6 ? tile.rows * tile.columns * 4 : 0;
  const int room = std::min(limit, (limit + 1024) / resident - 1024) - beside_blocks;

  constexpr int beside = 1;  // a block of depth that is copied while another is computed
  int stages = std::min(room / bytes, 14);
  if (!bulk) stages = std::min(stages, 6);
  if (std::min(stages, depth) < std::min(beside + 1, depth) || room < exchanged) return {};
  stages = std::max(stages, beside + 1);
  const int slots = std::min(stages, depth);
  return {&tile, splits, stages, slots, stages - beside, std::max(slots * bytes + beside_blocks, exchanged), 0};
}

// How long a choice takes on an H200, in nanoseconds and bytes a nanosecond; tiles are counted in areas of 128x128.
struct GemmRates {
  double start, begin;      // of the kernel, and of a tile
  double l2, latency;       // bytes of all multiprocessors, and until a block of depth is there
  double block;             // the products of a block of depth of one area
  double narrow, low;       // as many times that in tiles of 64 columns, and of 64 rows
  double exchange, gather;  // to exchange sums at all, and those of an area
  double end, store;        // of a tile's area: its last step, and its share of what all write
  double power;             // how sharply the longest of what goes on at once decides
  double least;             // of a block of depth, however few its products
};

// Fitted to all tiles and splits of layers at batch 10: of ResNet-50 and VGG16; with a prologue of DenseNet; in TF32 of
// ResNet-50 and SqueezeNet. Other GPUs' order among tiles is that of Hopper's before its rows went through registers.
inline const GemmRates& gemm_rates(const ai3_args* a) {
  static constexpr GemmRates kHalf{2216, 739.6, 14950, 866.3, 217.7, 1.227, 1.461,
                                   1428, 2835,  621.8, 10.33, 1.882, 218.2};
  static constexpr GemmRates kHalfPrologue{2768, 494.6, 17090, 630.4, 537.2, 1.07, 0.9143,
                                           1671, 1715,  1357,  16.14, 1.5,   263.8};
  static constexpr GemmRates kTf32{1626, 841.7, 20570, 401.1, 307.2, 1.228, 1.324,
                                   2169, 152.1, 3008,  21.28, 1.668, 200};
  static constexpr GemmRates kOlderTf32{2118, 1100,  14320, 758.6, 229.6, 1.419, 1.776,
                                        1841, 350.7, 2233,  12.21, 2.637, 0};
  static constexpr GemmRates kStrict{1447, 2418, 30900, 1323, 686.1, 1.16, 1.328, 1367, 74.99, 684.8, 25.6, 2.0, 0};
  if (a->dtype != AI3_FLOAT32) return a->has_prologue ? kHalfPrologue : kHalf;
  if (!a->allow_tf32) return kStrict;
  return a->sm == 90 ? kTf32 : kOlderTf32;
}

inline double gemm_time(const GemmShape& s, const GemmChoice& c) {
  const GemmTile& t = *c.tile;
  const GemmRates& r = gemm_rates(s.args);
  const bool bulk = t.threads % 64 != 0;
  const int parts = gemm_is_strict(s.args) ? 2 : 1;
  const auto norm = [&](double x, double y, double z) {
    return std::pow(std::pow(x, r.power) + std::pow(y, r.power) + std::pow(z, r.power), 1 / r.power);
  };
  const int64_t tiles = cuda::ceil_div(s.rows, t.rows) * cuda::ceil_div(s.columns, t.columns) * s.groups * c.splits;
  const auto depth = double(cuda::ceil_div(gemm_blocks(s), c.splits));
  const double area = t.rows * t.columns / 16384.0, bytes = (t.rows + parts * t.columns) * 128;
  // Where the accelerator does not bring the blocks, the threads that multiply do.
  const double block = area * r.block * (t.columns <= 64 ? r.narrow : 1) * (t.columns == 32 ? r.narrow : 1) *
                       (t.rows == 64 ? r.low : 1) * (bulk ? 1 : 4);
  // Halves without a prologue were fitted without it, but for tiles that are as narrow.
  const bool plain_halves = s.args->dtype != AI3_FLOAT32 && !s.args->has_prologue;
  const double least = plain_halves && t.columns > 32 ? 0 : r.least;
  const double alone = r.begin + depth * std::max({block, r.latency / std::min(c.slots, 14), least}) + area * r.end;
  // A cluster is within one part of the GPU, whose multiprocessors it may not fill.
  const int resident = std::min(t.most_resident, 228 * 1024 / (c.shared + 1024));
  const int64_t most = (c.splits == 1 ? 132 : c.splits == 2 ? 128 : 112) * resident;
  const auto wave = [&](int64_t count) {
    const auto each = double(cuda::ceil_div(count, 132));
    const double time = norm(each * depth * block, double(count) * (depth * bytes / r.l2 + area * r.store), alone);
    return c.splits > 1 ? time + r.exchange + each * area * r.gather * (c.splits - 1) / c.splits : time;
  };
  return r.start + double(tiles / most) * wave(most) + (tiles % most != 0 ? wave(tiles % most) : 0);
}

inline GemmChoice find_choice(const GemmShape& s) {
  const GemmTiles tiles = gemm_tiles(s);
  GemmChoice best{};
  for (const GemmTile* tile = tiles.first; tile < tiles.first + tiles.count; ++tile) {
    for (const int splits : {1, 2, 4, kMostSplits}) {
      if (splits > 1 && (s.args->sm != 90 || splits > gemm_blocks(s))) break;
      for (int resident = 1; resident <= tile->most_resident; ++resident) {
        GemmChoice choice = gemm_choice(s, *tile, splits, resident);
        if (choice.tile == nullptr) break;
        choice.time = gemm_time(s, choice);
        if (best.tile == nullptr || choice.time < best.time) best = choice;
      }
    }
  }
  return best;
}

// The choice of a shape, which takes as long to find as a small layer to compute: kept by each thread.
inline GemmChoice choose_gemm(const GemmShape& s) {
  const ai3_args* a = s.args;
  using Key = std::array<int64_t, 24>;
  const Key key = {a->sm,
                   a->dtype,
                   a->allow_tf32,
                   a->activation > AI3_RELU6,
                   a->has_prologue,
                   s.rows,
                   s.columns,
                   s.channels,
                   s.kernel_h,
                   s.kernel_w,
                   s.groups,
                   s.in_pixel,
                   s.has_window,
                   a->input.size[2],
                   a->input.size[3],
                   a->output.size[2],
                   a->output.size[3],
                   a->stride_h,
                   a->stride_w,
                   a->dilation_h,
                   a->dilation_w,
                   a->pad_top,
                   a->pad_left,
                   a->input.ndim};
  constexpr size_t kMost = 4096;  // of shapes that never repeat none is worth keeping
  thread_local std::map<Key, GemmChoice> known;
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() >= kMost) known.clear();
  return known[key] = find_choice(s);
}

}  // namespace ai3
