// How long a tile of gemm_tiles.cuh takes for a shape, by a model of the GPU.
#pragma once

#include <ai3/gemm_tiles.cuh>
#include <cmath>

namespace ai3 {

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
  double turns;  // of gemm_resident.cuh: as many times its products, between whose turns nothing is multiplied
};

// `python -m bench tiles` measures all tiles beside these estimates, and `python -m bench fit` fits rates to its
// results. Fitted to all tiles and splits of layers at batch 10: of ResNet-50, VGG16 and DenseNet; in TF32 of
// ResNet-50, VGG16 and SqueezeNet; of patches of the image to 23 convolutions of 3x3 on an H200, of 32 to 512 channels,
// within 8 %. Other GPUs' order among tiles is that of Hopper's without what only it has.
inline const GemmRates& gemm_rates(const ai3_args* a, bool has_halo) {
  static constexpr GemmRates kHalf{1649, 969.4, 20850, 967.7, 190.5, 1.303, 1.311, 1490,
                                   2130, 430.3, 21.6,  1.66,  207.2, 0,     2.017, 0};
  static constexpr GemmRates kHalfPrologue{2768, 494.6, 17090, 630.4, 537.2, 1.07, 0.9143, 1671,
                                           1715, 1357,  16.14, 1.5,   263.8, 0,    1,      0};
  static constexpr GemmRates kTf32{1336, 1053,  17000, 1097,  61.83, 0.4448, 1.172, 2496,
                                   1245, 605.3, 28,    1.801, 168.5, 173.6,  1.465, 0};
  static constexpr GemmRates kHalfHalo{1752, 636.3, 14130, 734.3, 173.1, 1.414, 1.311, 0,
                                       0,    557.1, 11.49, 1.268, 183.8, 0,     1,     1.416};
  static constexpr GemmRates kTf32Halo{2191, 241.1, 27250, 838.6, 188,   1.343, 1.311, 0,
                                       0,    662.3, 18.03, 1.132, 182.5, 0,     1,     1.5};
  static constexpr GemmRates kOlderHalf{2216, 739.6, 14950, 866.3, 217.7, 1.227, 1.461, 1428,
                                        2835, 621.8, 10.33, 1.882, 0,     0,     1,     0};
  static constexpr GemmRates kOlderTf32{2118,  1100, 14320, 758.6, 229.6, 1.419, 1.776, 1841,
                                        350.7, 2233, 12.21, 2.637, 0,     0,     1,     0};
  static constexpr GemmRates kStrict{1447,  2418,  30900, 1323, 686.1, 1.16, 1.328, 1367,
                                     74.99, 684.8, 25.6,  2.0,  0,     0,    1,     0};
  if (a->has_prologue && a->dtype != AI3_FLOAT32) return kHalfPrologue;
  if (gemm_is_strict(a)) return kStrict;
  const bool is_half = a->dtype != AI3_FLOAT32;
  if (has_halo) return is_half ? kHalfHalo : kTf32Halo;
  if (a->sm == 90) return is_half ? kHalf : kTf32;
  return is_half ? kOlderHalf : kOlderTf32;
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

inline double gemm_time(const GemmShape& s, const GemmChoice& c, const GemmRates& r) {
  const GemmTile& t = *c.tile;
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
  const int multiprocessors = c.splits == 1 ? 132 : c.splits == 2 ? 128 : 112;
  const int64_t most = multiprocessors * resident;
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
           norm(each * depth * block * r.turns, double(tiles) * (depth * image / r.l2 + area * store), alone);
  }
  const auto wave = [&](int64_t count) {
    const auto each = double(cuda::ceil_div(count, multiprocessors));
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

inline double gemm_time(const GemmShape& s, const GemmChoice& c) {
  return gemm_time(s, c, gemm_rates(s.args, c.tile->down > 0));
}

}  // namespace ai3
