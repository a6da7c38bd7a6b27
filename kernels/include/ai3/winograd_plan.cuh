// How conv2d/winograd.cu computes a shape: by which of its transforms and products, of how many tiles at once.
#pragma once

#include <ai3/cuda.h>

#include <algorithm>

namespace ai3::winograd {

// How the products are computed, with what it was measured to take on an H200 (us).
struct Multiply {
  const char* name;
  int64_t rows;  // of tiles of products, of 64 columns
  unsigned threads, shared;
  double tile, step;    // a tile, and 32 channels of it, where they fill the GPU
  double step_latency;  // 32 channels of a tile, where there are few tiles
};
constexpr Multiply kFew = {"winograd_multiply_16", 16, 128, 8 * 80 * 64, 0.2, 0.26, 0.55};
constexpr Multiply kAny = {"winograd_multiply_64", 64, 128, 4 * 128 * 64, 0.8, 0.45, 0.6};
constexpr Multiply kHopper[] = {{"winograd_wgmma_64", 64, 128, 3 * 2 * 192 * 64, 0.79, 0.33, 0.5},
                                {"winograd_wgmma_128", 128, 256, 3 * 2 * 256 * 64, 1.38, 0.56, 0.6}};

struct Plan {
  int64_t tile;  // outputs along a side
  int64_t tiles, frequencies, blocks, width;
  Multiply multiply;
  int64_t splits;
  int64_t launch, rows;  // tiles of a launch, and rows of its V
  double time;           // us

  int64_t v_elements(int64_t of_rows) const { return frequencies * blocks * 16 * of_rows; }
  int64_t product_elements(int64_t of_rows) const { return splits * frequencies * width * of_rows; }
};

inline int64_t round_up(int64_t a, int64_t b) { return cuda::ceil_div(a, b) * b; }

// By the image alone, so that a weight is packed once for any batch. F(4x4) computes less, but has 36 / 16 the weights
// and fewer tiles, which must be read, and fill the GPU, even for few images.
inline int64_t tile_of(const ai3_args* a) {
  const auto work = [&](int64_t tile) {
    const int64_t tiles = cuda::ceil_div(a->output.size[2], tile) * cuda::ceil_div(a->output.size[3], tile);
    return (tile + 2) * (tile + 2) * (tiles + 24);
  };
  return work(2) < work(4) ? 2 : 4;
}

inline void consider(Plan& best, const Multiply& multiply, int64_t splits) {
  const double launch = 2, blocks = double(cuda::ceil_div(best.tiles, multiply.rows) * (best.width / 64)),
               each = double(cuda::ceil_div(best.blocks / 2, splits)),
               sm_blocks = double(cuda::ceil_div(int64_t(blocks) * best.frequencies * splits, 132)),
               plane = double(best.frequencies * best.tiles) * 4 / 3e6;
  Plan plan = best;
  plan.multiply = multiply;
  plan.splits = splits;
  const double products = std::max({sm_blocks * (multiply.tile + multiply.step * each), multiply.step_latency * each,
                                    double(best.frequencies * best.blocks * 16 * best.width) * 4 / 3e6});
  plan.time =
      3 * launch + products + plane * double(best.blocks) * 16 + (plane * double(best.width) + 1) * double(splits);
  if (best.time == 0 || plan.time < best.time) best = plan;
}

inline Plan plan_of(const ai3_args* a) {
  Plan plan = {};
  plan.tile = tile_of(a);
  plan.frequencies = (plan.tile + 2) * (plan.tile + 2);
  plan.tiles =
      a->input.size[0] * cuda::ceil_div(a->output.size[2], plan.tile) * cuda::ceil_div(a->output.size[3], plan.tile);
  plan.blocks = round_up(std::max<int64_t>(1, a->input.size[1]), 32) / 16;
  plan.width = round_up(std::max<int64_t>(1, a->output.size[1]), 64);
  for (const int64_t splits : {1, 2, 4}) {
    if (plan.blocks / 2 < splits) break;
    if (plan.tiles <= kFew.rows) {
      consider(plan, kFew, splits);
    } else if (a->sm == 90) {
      for (const Multiply& multiply : kHopper) consider(plan, multiply, splits);
    } else {
      consider(plan, kAny, splits);
    }
  }
  // More tiles at once do not pay, but take more memory.
  constexpr int64_t kMaxWorkspace = int64_t{512} << 20;
  const int64_t limit = a->max_workspace < 0 ? kMaxWorkspace : std::min(kMaxWorkspace, a->max_workspace);
  const int64_t row_bytes = (plan.v_elements(1) + plan.product_elements(1)) * 4;
  const int64_t most = std::max<int64_t>(1, limit / row_bytes / plan.multiply.rows) * plan.multiply.rows;
  const int64_t launches = std::max<int64_t>(1, cuda::ceil_div(plan.tiles, most));
  plan.rows = round_up(std::max<int64_t>(1, cuda::ceil_div(plan.tiles, launches)), plan.multiply.rows);
  plan.launch = plan.rows;
  return plan;
}

}  // namespace ai3::winograd
