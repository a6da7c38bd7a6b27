// The host's side of gemm_few.cuh: how an image's part lies in shared memory, whether it fits, and the launch.
#pragma once

#include <ai3/gemm_few.cuh>
#include <ai3/gemm_host.cuh>

namespace ai3 {

struct FewChoice {
  bool fits, by_rows;
  int steps, row_steps, patch_h, patch_w, lead, shift;
  int shared, shared_plain;  // bytes, also where sums end with no more than their bias and a clamp
};

inline FewChoice few_fitting(const GemmShape& s, FewChoice c, int64_t patches) {
  c.steps = int(s.kernel_h) * c.row_steps;
  const int64_t weights = int64_t(c.steps) * kFewStepBytes;
  // By rows the next part of the image comes while sums are exchanged.
  const int64_t shared = weights + (c.by_rows ? patches + kFewExchange : std::max<int64_t>(patches, kFewExchange));
  c.fits = shared <= gemm_shared_limit(s.args->sm);
  c.shared = int(shared), c.shared_plain = int(weights + patches);
  return c;
}

// Where an image's rows are whole 16-byte parts and each output pixel's first element is in a word's first place.
inline FewChoice few_by_rows(const GemmShape& s, int64_t patch_h) {
  const ai3_args* a = s.args;
  const int64_t bytes = gemm_element_bytes(a), count = 16 / bytes, step = a->stride_w * s.channels;
  const int64_t row = a->input.size[3] * s.channels * bytes;
  if (s.in_pixel != s.channels || a->dilation_w != 1 || row % 16 != 0 || step * bytes % 4 != 0) return {};
  const int64_t lead = (count - a->pad_left * s.channels % count) % count, shift = bytes == 2 ? lead % 2 : 0;
  const int64_t row_steps = cuda::ceil_div((shift + s.kernel_w * s.channels) * bytes, 32);
  const int64_t parts = cuda::ceil_div((lead - shift + (kFewColumns - 1) * step) * bytes + row_steps * 32, 16);
  return few_fitting(s, {false, true, 0, int(row_steps), int(patch_h), int(parts), int(lead), int(shift)},
                     2 * patch_h * parts * 16);
}

inline FewChoice few_by_pixels(const GemmShape& s, int64_t patch_h) {
  const ai3_args* a = s.args;
  const int64_t bytes = gemm_element_bytes(a), taps = bytes == 2 ? 4 : 2;
  const int64_t row_steps = cuda::ceil_div(s.kernel_w, taps);
  const int64_t patch_w = (kFewColumns - 1) * a->stride_w + (row_steps * taps - 1) * a->dilation_w + 1;
  return few_fitting(s, {false, false, 0, int(row_steps), int(patch_h), int(patch_w)}, patch_h * patch_w * 4 * bytes);
}

// Of any layout in which a pixel's channels lie together; strict float32 is computed by gemm_tile.cuh.
inline FewChoice choose_few(const GemmShape& s) {
  const ai3_args* a = s.args;
  const bool is_taken = s.has_window && s.kernel_h * s.kernel_w > 1 && s.channels <= 4 && s.groups == 1 &&
                        a->dtype != AI3_FLOAT64 && !gemm_is_strict(a);
  constexpr int64_t kMost = 4096;  // of what follows none may overflow
  if (!is_taken || s.kernel_h > 64 || s.kernel_w > 64 || std::max(a->dilation_h, a->dilation_w) > kMost ||
      std::max(a->stride_h, a->stride_w) > kMost)
    return {};
  const int64_t patch_h = (kFewRows - 1) * a->stride_h + (s.kernel_h - 1) * a->dilation_h + 1;
  const FewChoice by_rows = few_by_rows(s, patch_h);
  return by_rows.fits ? by_rows : few_by_pixels(s, patch_h);
}

// What tells weights apart that are packed for one choice from those for another.
inline int64_t few_variant(const FewChoice& c) {
  return int64_t(c.fits) | int64_t(c.by_rows) << 1 | int64_t(c.shift) << 2;
}

inline size_t few_packed_bytes(const GemmShape& s, const FewChoice& c) {
  return size_t(cuda::ceil_div(s.columns, 64)) * size_t(c.steps) * kFewStepBytes;
}

inline void pack_few(const GemmShape& s, const FewChoice& c, void* dst) {
  const auto total = int32_t(few_packed_bytes(s, c) / 16);
  const FewPackParams p{s.args->weight.data,
                        dst,
                        total,
                        int(s.columns),
                        int(s.channels),
                        int(s.kernel_h),
                        int(s.kernel_w),
                        c.steps,
                        c.row_steps,
                        c.by_rows ? int(s.channels) : 4,
                        c.shift};
  const char* name = gemm_element_bytes(s.args) == 2 ? "few_pack_float16" : "few_pack_tf32";
  cuda::launch(s.args, name, {cuda::ceil_div(total, 256)}, 256, 0, p);
}

inline int64_t few_tiles(const GemmShape& s) {
  const int64_t* out = s.args->output.size;
  return out[0] * cuda::ceil_div(out[2], kFewRows) * cuda::ceil_div(out[3], kFewColumns);
}

// That are on a GPU at once with so much shared memory each. Of 132 multiprocessors: where there are others, the blocks
// still do all tiles.
inline int64_t few_blocks(const GemmShape& s, const FewChoice& c, int shared) {
  const int64_t most = c.by_rows || gemm_element_bytes(s.args) == 2 ? 4 : 3;  // by their registers
  return 132 * std::clamp<int64_t>(gemm_shared_limit(s.args->sm) / (shared + 1024), 1, most);
}

inline void run_few(const GemmShape& s, const FewChoice& c) {
  const ai3_args* a = s.args;
  FewParams p{gemm_params(s),
              c.steps,
              c.row_steps,
              c.patch_h,
              c.patch_w,
              int(few_tiles(s)),
              int(cuda::ceil_div(a->output.size[2], kFewRows)),
              int(cuda::ceil_div(a->output.size[3], kFewColumns)),
              c.lead,
              c.shift,
              is_aligned(a->input.data)};
  const std::string name = std::string(c.by_rows ? "few_rows_" : "few_pixels_") + gemm_math(a);
  const bool is_plain = p.gemm.is_clamp != 0 && p.gemm.aligned != 0 && p.gemm.residual == nullptr;
  const int shared = is_plain ? c.shared_plain : c.shared;
  const cuda::Grid grid{std::min<int64_t>(p.tiles, few_blocks(s, c, shared)), cuda::ceil_div(s.columns, 64)};
  if (a->sm == 90) {
    launch_gemm(a, name, grid, kFewThreads, unsigned(shared), p);
  } else {
    cuda::launch(a, name.c_str(), grid, kFewThreads, unsigned(shared), p);
  }
}

// Nanoseconds: what is written, and the steps of the tiles that a block does, one behind the other. On an H100, first
// layers of 64 channels in float16 and TF32 took 0.78 to 1.06 times as long, of 16 and 32 channels 1.2 and 1.5 times.
inline double few_cost(const GemmShape& s, const FewChoice& c) {
  const double written = double(s.rows * s.columns * gemm_element_bytes(s.args));
  const int64_t in_turn =
      cuda::ceil_div(few_tiles(s) * cuda::ceil_div(s.columns, 64), few_blocks(s, c, c.shared_plain));
  return 3000 + written / 3000 + double(in_turn * c.steps) * 200;
}

}  // namespace ai3
