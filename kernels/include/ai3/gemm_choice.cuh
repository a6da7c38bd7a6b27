// What gemm_tile.cuh multiplies, and by which tile and how many shares of the depth: those that a model of the GPU's
// time is shortest for.
#pragma once

#include <ai3/gemm_stream.cuh>
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
  int64_t joined =
      1;  // taps of a row of the window in memory's order, which are one of as many times the channels here
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

// Whose blocks compute one tile, by gemm_bulk.cuh or gemm_copies.cuh or of few rows, or tile after tile.
enum class GemmKind { kOnce, kThin, kResident, kStream };
struct GemmTile {
  int rows, columns, threads, most_resident;  // at most as many tiles on a multiprocessor at once
  const char* name;
  int down = 0, right = 0;  // patches of gemm_halo.cuh; none of the others
  GemmKind kind = GemmKind::kOnce;
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

// A tile's part of the image: pixels and bytes.
struct GemmHalo {
  int64_t height, width, bytes;
};
inline GemmHalo gemm_halo(const GemmShape& s, const GemmTile& tile) {
  const int64_t height = tile.down * 8 + (s.kernel_h - 1) * s.args->dilation_h;
  const int64_t width = tile.right * 8 + (s.kernel_w - 1) * s.args->dilation_w;
  return {height, width, cuda::ceil_div(height * width * 128, 1024) * 1024};
}

// Whether the taps of the window can share a tile's part of the image.
inline bool gemm_has_halo(const GemmShape& s) {
  const ai3_args* a = s.args;
  constexpr int64_t kMost = 64;  // pixels that a window reaches over; a rectangle that is copied has up to 256
  return a->stride_h == 1 && a->stride_w == 1 && s.kernel_h * s.kernel_w > 1 && a->has_prologue == 0 &&
         !gemm_is_strict(a) && (s.kernel_h - 1) * a->dilation_h < kMost && (s.kernel_w - 1) * a->dilation_w < kMost;
}

inline bool is_aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }

// Whether the weights' columns may be an instruction's rows.
inline bool gemm_may_be_thin(const GemmShape& s) {
  constexpr int64_t kMost = 4 * kThinRows;  // weights are read for each tile of these
  return !s.has_window && s.groups == 1 && !gemm_is_strict(s.args) && s.args->has_prologue == 0 && s.rows <= kMost;
}

// Whether the accelerator can bring residuals and take results away too.
inline bool gemm_may_stream(const GemmShape& s) {
  const ai3_args* a = s.args;
  const int64_t bytes = gemm_element_bytes(a);
  return !s.has_window && s.groups == 1 && !gemm_is_strict(a) && a->has_prologue == 0 && a->activation <= AI3_RELU6 &&
         s.columns * bytes % 16 == 0 && s.out_pixel * bytes % 16 == 0 && is_aligned(a->output.data) &&
         is_aligned(a->residual.data) && is_aligned(a->bias);
}

inline GemmTiles gemm_tiles(const GemmShape& s) {
  static constexpr GemmTile kBulk[] = {
      {kThinRows, kThinColumns, 288, 2, "16x64_thin", 0, 0, GemmKind::kThin},
      {64, 64, 288, 1, "64x64_stream", 0, 0, GemmKind::kStream},
      {64, 128, 288, 1, "64x128_stream", 0, 0, GemmKind::kStream},
      {64, 32, 160, 6, "64x32_bulk"},
      {128, 32, 288, 4, "128x32_bulk"},
      {64, 64, 160, 5, "64x64_bulk"},
      {64, 128, 160, 4, "64x128_bulk"},
      {128, 64, 288, 3, "128x64_bulk"},
      {128, 128, 288, 2, "128x128_bulk"},
      {256, 64, 288, 2, "256x64_bulk"},
      {256, 128, 288, 1, "256x128_bulk"},
      {128, 256, 288, 1, "128x256_bulk"},
      {128, 64, 288, 3, "128x64_halo", 1, 2},
      {128, 128, 288, 2, "128x128_halo", 1, 2},
      {256, 64, 288, 2, "256x64_halo", 2, 2},
      {256, 128, 288, 1, "256x128_halo", 2, 2},
      {128, 64, 416, 1, "128x64_resident", 1, 2, GemmKind::kResident},
  };
  // The rows of float32 go through registers, of which tiles of 256 rows have too few; those of patches do not.
  static constexpr GemmTile kTf32Bulk[] = {
      {kThinRows, kThinColumns, 288, 2, "16x64_thin", 0, 0, GemmKind::kThin},
      {64, 64, 288, 1, "64x64_stream", 0, 0, GemmKind::kStream},
      {64, 128, 288, 1, "64x128_stream", 0, 0, GemmKind::kStream},
      {64, 32, 160, 6, "64x32_bulk"},
      {128, 32, 288, 3, "128x32_bulk"},
      {64, 64, 160, 5, "64x64_bulk"},
      {64, 128, 160, 3, "64x128_bulk"},
      {128, 64, 288, 2, "128x64_bulk"},
      {128, 128, 288, 2, "128x128_bulk"},
      {128, 256, 288, 1, "128x256_bulk"},
      {128, 64, 288, 3, "128x64_halo", 1, 2},
      {128, 128, 288, 2, "128x128_halo", 1, 2},
      {256, 64, 288, 2, "256x64_halo", 2, 2},
      {256, 128, 288, 1, "256x128_halo", 2, 2},
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
  if (s.args->pools) {
    if (!gemm_is_bulk(s) || !gemm_has_halo(s)) return {nullptr, 0};
    return s.args->dtype == AI3_FLOAT32 ? GemmTiles{kTf32Bulk + 10, 4} : GemmTiles{kBulk + 12, 5};
  }
  if (gemm_is_bulk(s)) {
    if (s.args->has_prologue) return strict ? GemmTiles{kStrictPrologue, 2} : GemmTiles{kPrologue, 4};
    if (strict) return {kStrictBulk, 3};
    const bool halo = gemm_has_halo(s);
    return s.args->dtype == AI3_FLOAT32 ? GemmTiles{kTf32Bulk, halo ? 14 : 10} : GemmTiles{kBulk, halo ? 17 : 12};
  }
  if (s.args->sm == 90) return {kAny, 1};
  return strict ? GemmTiles{kStrictAny, 2} : GemmTiles{kAny, 3};
}

struct GemmChoice {
  const GemmTile* tile;
  int splits, stages, slots, ahead, shared;
  int barriers;   // where they are in shared memory, of those that do not compute tile after tile
  double time;    // nanoseconds
  int halos = 0;  // parts of images in shared memory; of gemm_resident.cuh, for each warpgroup
};

inline int gemm_shared_limit(int sm) {
  if (sm == 80 || sm == 87) return 163 * 1024;
  return sm >= 90 && sm < 120 ? 227 * 1024 : 99 * 1024;
}

// With as much of the depth in shared memory as leaves room for `resident` tiles; no tile where nothing does.
inline GemmChoice gemm_choice(const GemmShape& s, const GemmTile& tile, int splits, int resident) {
  const bool strict = gemm_is_strict(s.args), bulk = tile.threads % 64 != 0;
  const bool has_halo = tile.down > 0, is_thin = tile.kind == GemmKind::kThin;
  if ((has_halo && splits > 1) || (is_thin && !gemm_may_be_thin(s))) return {};
  if (tile.kind == GemmKind::kStream) {
    constexpr int kMost = 8;
    if (splits > 1 || resident > 1 || !gemm_may_stream(s)) return {};
    const int64_t blocks = gemm_blocks(s),
                  stage = (blocks + tile.columns * gemm_element_bytes(s.args) / 128) * tile.rows;
    const int64_t beside = blocks * tile.columns * 128 + kBulkBarriers;
    // A place is to be of one warpgroup: another's tile may come before the one that lies there first.
    const int64_t room = (gemm_shared_limit(s.args->sm) - beside) / (stage * 128);
    const int64_t stages = std::min<int64_t>(room, kMost) / kStreamTeams * kStreamTeams;
    if (stages <= kStreamTeams) return {};  // none would be brought while others are computed
    return {&tile, 1, int(stages), int(blocks), 0, int(beside + stages * stage * 128), 0, 0};
  }
  if (tile.kind == GemmKind::kResident) {
    constexpr int kMost = 4;
    const int64_t blocks = gemm_blocks(s), halo = gemm_halo(s, tile).bytes;
    const int64_t beside = blocks * tile.columns * 128 + kBulkBarriers;
    const int64_t halos = std::min<int64_t>((gemm_shared_limit(s.args->sm) - beside) / halo / kResidentTeams, kMost);
    if (s.args->activation > AI3_RELU6 || halos < 2) return {};
    return {&tile, 1, int(blocks), int(blocks), 0, int(beside + kResidentTeams * halos * halo), 0, 0, int(halos)};
  }
  const int bytes = ((has_halo ? 0 : tile.rows) + tile.columns * (strict ? 2 : 1)) * 128;
  const int halo_slots = has_halo ? int(std::min<int64_t>(2, gemm_tap_blocks(s))) : 0;
  const int halos = has_halo ? halo_slots * int(gemm_halo(s, tile).bytes) : 0;
  const int depth = int(cuda::ceil_div(gemm_blocks(s), splits)), limit = gemm_shared_limit(s.args->sm);
  const int prologue = s.args->has_prologue ? depth * int(128 / gemm_element_bytes(s.args)) * 8 : 0;
  const int beside_blocks = bulk ? kBulkBarriers + prologue + halos : 2048;
  int exchanged = splits > 1 || s.args->activation > AI3_RELU6 ? tile.rows * tile.columns * 4 : 0;
  if (is_thin) exchanged = kThinWarps * tile.rows * tile.columns * 4;
  const int room = std::min(limit, (limit + 1024) / resident - 1024) - beside_blocks;

  constexpr int beside = 1;  // a block of depth that is copied while another is computed
  if (room < 0) return {};
  int stages = std::min(room / bytes, is_thin ? 2 * kThinWarps : has_halo ? 12 : 14);
  if (!bulk) stages = std::min(stages, 6);
  if (std::min(stages, depth) < std::min(beside + 1, depth) || room < exchanged) return {};
  stages = std::max(stages, beside + 1);
  // Of what warps read apart a place is to be of one warp: another's block may come before the one there.
  if (is_thin && depth > stages) stages = stages / kThinWarps * kThinWarps;
  if (stages == 0) return {};
  const int slots = std::min(stages, depth);
  // Nothing is to lie where a barrier was: its memory may change after those who waited have gone on.
  const int barriers = std::max(slots * bytes + halos, exchanged);
  const int shared = bulk ? barriers + kBulkBarriers + prologue : std::max(slots * bytes + beside_blocks, exchanged);
  return {&tile, splits, stages, slots, stages - beside, shared, barriers, 0, halo_slots};
}

// How long a choice takes on an H100 or H200, in nanoseconds and bytes a nanosecond; tiles are counted in areas of
// 128x128.
struct GemmRates {
  double start, begin;      // of the kernel, and of a tile
  double l2, latency;       // bytes of all multiprocessors, and until a block of depth is there
  double block;             // the products of a block of depth of one area
  double narrow, low;       // as many times that in tiles of 64 columns, and of 64 rows
  double exchange, gather;  // to exchange sums at all, and those of an area
  double end, store;        // of a tile's area: its last step, and its share of what all write
  double power;             // how sharply the longest of what goes on at once decides
  double least;             // of a block of depth, however few its products
  double rows;              // beside a block's products, of 128 of its rows that go through registers
  double apart;             // as many times what is read by shares of the depth: tiles that read the same come later
};

// Fitted to all tiles and splits of layers at batch 10: of ResNet-50, VGG16 and DenseNet; in TF32 of ResNet-50, VGG16
// and SqueezeNet, with patches of the image of VGG16's and ResNet-50's. Other GPUs' order among tiles is that of
// Hopper's without what only it has.
inline const GemmRates& gemm_rates(const ai3_args* a, bool has_halo) {
  static constexpr GemmRates kHalf{1649, 969.4, 20850, 967.7, 190.5, 1.303, 1.311, 1490,
                                   2130, 430.3, 21.6,  1.66,  207.2, 0,     2.017};
  static constexpr GemmRates kHalfPrologue{2768, 494.6, 17090, 630.4, 537.2, 1.07, 0.9143, 1671,
                                           1715, 1357,  16.14, 1.5,   263.8, 0,    1};
  static constexpr GemmRates kTf32{1336, 1053,  17000, 1097,  61.83, 0.4448, 1.172, 2496,
                                   1245, 605.3, 28,    1.801, 168.5, 173.6,  1.465};
  static constexpr GemmRates kTf32Halo{2041, 472.7, 15900, 874.8, 198.3, 1.388, 1.311, 1490,
                                       2130, 2242,  26.18, 1.5,   218.7, 0,     1};
  static constexpr GemmRates kOlderHalf{2216, 739.6, 14950, 866.3, 217.7, 1.227, 1.461, 1428,
                                        2835, 621.8, 10.33, 1.882, 0,     0,     1};
  static constexpr GemmRates kOlderTf32{2118,  1100, 14320, 758.6, 229.6, 1.419, 1.776, 1841,
                                        350.7, 2233, 12.21, 2.637, 0,     0,     1};
  static constexpr GemmRates kStrict{1447,  2418,  30900, 1323, 686.1, 1.16, 1.328, 1367,
                                     74.99, 684.8, 25.6,  2.0,  0,     0,    1};
  if (a->dtype != AI3_FLOAT32) return a->has_prologue ? kHalfPrologue : a->sm == 90 ? kHalf : kOlderHalf;
  if (!a->allow_tf32) return kStrict;
  return has_halo ? kTf32Halo : a->sm == 90 ? kTf32 : kOlderTf32;
}

inline int64_t gemm_tiles_down(const GemmShape& s, const GemmTile& tile) {
  return cuda::ceil_div(s.args->output.size[2], tile.down * 8);
}
inline int64_t gemm_tiles_right(const GemmShape& s, const GemmTile& tile) {
  return cuda::ceil_div(s.args->output.size[3], tile.right * 8);
}
inline int64_t gemm_row_tiles(const GemmShape& s, const GemmTile& tile) {
  if (tile.down == 0) return cuda::ceil_div(s.rows, tile.rows);
  return s.args->output.size[0] * gemm_tiles_down(s, tile) * gemm_tiles_right(s, tile);
}

// What a tile reads for a block of depth.
inline double gemm_block_bytes(const GemmShape& s, const GemmTile& tile, int parts) {
  const double rows =
      tile.down == 0 ? tile.rows * 128.0 : double(gemm_halo(s, tile).bytes) / double(s.kernel_h * s.kernel_w);
  return rows + parts * tile.columns * 128.0;
}

inline double gemm_time(const GemmShape& s, const GemmChoice& c) {
  const GemmTile& t = *c.tile;
  const GemmRates& r = gemm_rates(s.args, t.down > 0);
  const bool bulk = t.threads % 64 != 0;
  const int parts = gemm_is_strict(s.args) ? 2 : 1;
  const auto norm = [&](double x, double y, double z) {
    return std::pow(std::pow(x, r.power) + std::pow(y, r.power) + std::pow(z, r.power), 1 / r.power);
  };
  const int64_t tiles = gemm_row_tiles(s, t) * cuda::ceil_div(s.columns, t.columns) * s.groups * c.splits;
  const auto depth = double(cuda::ceil_div(gemm_blocks(s), c.splits));
  const double area = t.rows * t.columns / 16384.0, bytes = gemm_block_bytes(s, t, parts);
  // Where the accelerator does not bring the blocks, the threads that multiply do.
  const double block = area * r.block * (t.columns <= 64 ? r.narrow : 1) * (t.columns == 32 ? r.narrow : 1) *
                           (t.rows == 64 ? r.low : 1) * (bulk ? 1 : 4) +
                       r.rows * t.rows / 128;
  const double alone = r.begin + depth * std::max({block, r.latency / std::min(c.slots, 14), r.least}) + area * r.end;
  // Residuals are read when the products have ended: as long as so many times the results take to be written.
  const double residual = s.args->dtype == AI3_FLOAT32 ? 1.4 : 0.4;
  const double store = s.args->pools ? r.store / 4 : r.store * (1 + s.args->has_residual * residual);
  // A cluster is within one part of the GPU, whose multiprocessors it may not fill.
  const int resident = std::min(t.most_resident, 228 * 1024 / (c.shared + 1024));
  const int64_t most = (c.splits == 1 ? 132 : c.splits == 2 ? 128 : 112) * resident;
  if (t.kind == GemmKind::kThin) {
    // Of the weights: from memory, and by one multiprocessor.
    constexpr double kStart = 2000, kRead = 4350, kReadByOne = 45;
    const double weights = depth * t.columns * 128, turns = double(cuda::ceil_div(tiles, most));
    const int64_t at_once = std::min(tiles, most);
    const double turn =
        std::max(double(at_once) * weights / kRead, double(cuda::ceil_div(at_once, 132)) * weights / kReadByOne);
    return kStart + turns * turn + (c.splits > 1 ? r.exchange : 0);
  }
  if (t.kind == GemmKind::kStream) {
    // By its tiles, and half a turn of all multiprocessors more: what it reads, writes and adds to.
    constexpr double kStart = 3500, kRead = 7100, kWritten = 3600;
    const double added = t.columns == 128 && s.args->dtype == AI3_FLOAT32 ? 3700 : 4800;
    const auto row = double(t.columns * gemm_element_bytes(s.args));
    const double of_row = depth * 128 / kRead + row / kWritten + s.args->has_residual * row / added;
    return kStart + (double(tiles) + 66) * t.rows * of_row;
  }
  if (t.kind == GemmKind::kResident) {
    // Each multiprocessor has the weights brought once, and a tile computed while another is written.
    const double weights = depth * t.columns * 128, image = bytes - parts * t.columns * 128;
    const auto each = double(cuda::ceil_div(tiles, 132));
    return r.start + 132 * weights / r.l2 +
           norm(each * depth * block, double(tiles) * (depth * image / r.l2 + area * store), alone);
  }
  const auto wave = [&](int64_t count) {
    const auto each = double(cuda::ceil_div(count, 132));
    const double time =
        norm(each * depth * block, double(count) * (depth * bytes / r.l2 * (c.splits > 1 ? r.apart : 1) + area * store),
             alone);
    return c.splits > 1 ? time + r.exchange + each * area * r.gather * (c.splits - 1) / c.splits : time;
  };
  constexpr double kFromMemory = 3600;  // the weights, each once
  const auto weights = double(gemm_blocks(s) * parts * gemm_packed_columns(s) * s.groups * 128);
  const double products = double(tiles / most) * wave(most) + (tiles % most != 0 ? wave(tiles % most) : 0);
  return r.start + std::max(products, weights / kFromMemory);
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
  using Key = std::array<int64_t, 27>;
  const Key key = {a->sm,
                   a->dtype,
                   a->allow_tf32,
                   a->activation > AI3_RELU6,
                   a->has_prologue,
                   a->has_residual,
                   gemm_may_stream(s),
                   a->pools,
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
