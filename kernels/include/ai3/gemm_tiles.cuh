// What gemm_tile.cuh multiplies, the tiles that may compute it, and what each has in shared memory.
#pragma once

#include <ai3/gemm_stream.cuh>
#include <algorithm>
#include <iterator>

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
  // Patches of the image first, of which there are as many.
  constexpr int kPatches = 5;
  static constexpr GemmTile kBulk[] = {
      {128, 64, 288, 3, "128x64_halo", 1, 2},
      {128, 128, 288, 2, "128x128_halo", 1, 2},
      {256, 64, 288, 2, "256x64_halo", 2, 2},
      {256, 128, 288, 1, "256x128_halo", 2, 2},
      {128, 64, 416, 1, "128x64_resident", 1, 2, GemmKind::kResident},
      {64, 32, 160, 6, "64x32_bulk"},
      {128, 32, 288, 4, "128x32_bulk"},
      {64, 64, 160, 5, "64x64_bulk"},
      {64, 128, 160, 4, "64x128_bulk"},
      {128, 64, 288, 3, "128x64_bulk"},
      {128, 128, 288, 2, "128x128_bulk"},
      {256, 64, 288, 2, "256x64_bulk"},
      {256, 128, 288, 1, "256x128_bulk"},
      {128, 256, 288, 1, "128x256_bulk"},
      {kThinRows, kThinColumns, 288, 2, "16x64_thin", 0, 0, GemmKind::kThin},
      {64, 64, 288, 1, "64x64_stream", 0, 0, GemmKind::kStream},
      {64, 128, 288, 1, "64x128_stream", 0, 0, GemmKind::kStream},
  };
  // The rows of float32 go through registers, of which tiles of 256 rows have too few; those of patches do not.
  static constexpr GemmTile kTf32Bulk[] = {
      {128, 64, 288, 3, "128x64_halo", 1, 2},
      {128, 128, 288, 2, "128x128_halo", 1, 2},
      {256, 64, 288, 2, "256x64_halo", 2, 2},
      {256, 128, 288, 1, "256x128_halo", 2, 2},
      {128, 64, 416, 1, "128x64_resident", 2, 1, GemmKind::kResident},
      {64, 32, 160, 6, "64x32_bulk"},
      {128, 32, 288, 3, "128x32_bulk"},
      {64, 64, 160, 5, "64x64_bulk"},
      {64, 128, 160, 3, "64x128_bulk"},
      {128, 64, 288, 2, "128x64_bulk"},
      {128, 128, 288, 2, "128x128_bulk"},
      {128, 256, 288, 1, "128x256_bulk"},
      {kThinRows, kThinColumns, 288, 2, "16x64_thin", 0, 0, GemmKind::kThin},
      {64, 64, 288, 1, "64x64_stream", 0, 0, GemmKind::kStream},
      {64, 128, 288, 1, "64x128_stream", 0, 0, GemmKind::kStream},
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
  const bool strict = gemm_is_strict(s.args), is_float32 = s.args->dtype == AI3_FLOAT32;
  if (s.args->pools) {
    if (!gemm_is_bulk(s) || !gemm_has_halo(s)) return {nullptr, 0};
    return is_float32 ? GemmTiles{kTf32Bulk, kPatches} : GemmTiles{kBulk, kPatches};
  }
  if (gemm_is_bulk(s)) {
    if (s.args->has_prologue) return strict ? GemmTiles{kStrictPrologue, 2} : GemmTiles{kPrologue, 4};
    if (strict) return {kStrictBulk, 3};
    const int but = gemm_has_halo(s) ? 0 : kPatches;
    return is_float32 ? GemmTiles{kTf32Bulk + but, int(std::size(kTf32Bulk)) - but}
                      : GemmTiles{kBulk + but, int(std::size(kBulk)) - but};
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
    if (s.args->activation > AI3_RELU6 || halos < 1) return {};
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

}  // namespace ai3
