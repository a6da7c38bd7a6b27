// By which tile and how many shares of the depth gemm_tile.cuh multiplies: those that gemm_time.cuh is shortest for.
#pragma once

#include <ai3/gemm_time.cuh>
#include <array>
#include <map>

namespace ai3 {

// With as many tiles on a multiprocessor as are fastest; no tile where it cannot compute the shape.
inline GemmChoice find_choice(const GemmShape& s, const GemmTile& tile, int splits) {
  GemmChoice best{};
  for (int resident = 1; resident <= tile.most_resident; ++resident) {
    GemmChoice choice = gemm_choice(s, tile, splits, resident);
    if (choice.tile == nullptr) break;
    choice.time = gemm_time(s, choice);
    if (best.tile == nullptr || choice.time < best.time) best = choice;
  }
  return best;
}

inline GemmChoice find_choice(const GemmShape& s) {
  const GemmTiles tiles = gemm_tiles(s);
  GemmChoice best{};
  for (const GemmTile* tile = tiles.first; tile < tiles.first + tiles.count; ++tile) {
    for (const int splits : {1, 2, 4, kMostSplits}) {
      if (splits > 1 && (s.args->sm != 90 || splits > gemm_blocks(s))) break;
      const GemmChoice choice = find_choice(s, *tile, splits);
      if (choice.tile != nullptr && (best.tile == nullptr || choice.time < best.time)) best = choice;
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
