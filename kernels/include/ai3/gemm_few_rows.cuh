// The convolution of few channels (gemm_few.cuh) whose parts of the image lie in shared memory as they do in memory,
// two at once, the next one's copies under way. A row of the window is one run of elements.
#pragma once

#include <ai3/gemm_few.cuh>

#ifdef __CUDACC__

namespace ai3 {

// Copies what a tile reads, each thread as many 16-byte parts.
template <typename T>
__device__ __forceinline__ void copy_rows(const FewParams& few, const FewTile& tile, unsigned char* to) {
  using Bits = typename BitsOf<T>::type;
  constexpr int kCount = 16 / sizeof(T);
  const GemmParams& p = few.gemm;
  const Bits* const image = static_cast<const Bits*>(p.input);
  const int top = tile.y * p.stride_h - p.pad_top, width = p.width * p.channels;
  const int left = (tile.x * p.stride_w - p.pad_left) * p.channels - few.lead;
  const int row_step = kFewThreads / few.patch_w, part_step = kFewThreads % few.patch_w;
  int row = int(threadIdx.x) / few.patch_w, part = int(threadIdx.x) % few.patch_w;
  for (int i = threadIdx.x; i < few.patch_h * few.patch_w; i += kFewThreads) {
    const int y = top + row, x = left + part * kCount;
    const bool inside = unsigned(y) < unsigned(p.height) && unsigned(x) < unsigned(width);
    const Bits* from = inside ? image + (int64_t(tile.image) * p.height + y) * width + x : image;
    if (few.is_aligned) {
      copy_async_cached(shared_address(to + i * 16), from, inside);
    } else {
      for (int e = 0; e < kCount; ++e) reinterpret_cast<Bits*>(to + i * 16)[e] = load_where(from + e, inside);
    }
    row += row_step, part += part_step;
    if (part >= few.patch_w) part -= few.patch_w, ++row;
  }
}

template <Math M>
__device__ __forceinline__ void few_by_rows(const FewParams& few) {
  using T = typename ElementOf<M>::type;
  constexpr int kElements = 4 / sizeof(T), kStep = 32;  // elements of a word, bytes of a step
  const GemmParams& p = few.gemm;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int row_bytes = few.patch_w * 16, patch_bytes = few.patch_h * row_bytes;
  unsigned char* const patches = shared + few.steps * kFewStepBytes;
  unsigned char* const exchange = patches + 2 * patch_bytes;
  const int warp = int(threadIdx.x) / 32, lane = threadIdx.x % 32;

#if AI3_WGMMA
  wait_previous_grid();
#endif
  few_weights(few, shared);
  FewTile at(few, blockIdx.x);
  copy_rows<T>(few, at, patches);
  commit_copies();

  const int pixel_bytes = p.stride_w * p.channels * int(sizeof(T)), eight = 8 * pixel_bytes;
  const int first = (few.lead - few.shift) * int(sizeof(T)) + lane / 4 * pixel_bytes + lane % 4 * 4 +
                    2 * warp * p.stride_h * row_bytes;
  // What lies in a word before a row of the window, and in a step behind it, has no weight and may be no number.
  const int end = few.shift + p.kernel_w * p.channels, last = few.row_steps - 1;
  const auto mask = [&](int element) {
    uint32_t bits = 0;
    for (int e = 0; e < kElements; ++e) {
      if (element + e >= few.shift && element + e < end) bits |= (kElements == 1 ? ~0u : 0xffffu) << (e * 16);
    }
    return bits;
  };
  const int word = lane % 4 * kElements, last_word = last * 8 * kElements + word;
  const uint32_t first_mask = mask(word), last_mask = mask(last_word), last_next_mask = mask(last_word + 4 * kElements);

  FewSums<M> sums{p};
  int patch_at = 0;
  for (int tile = blockIdx.x; tile < few.tiles; tile += gridDim.x) {
    unsigned char* const patch = patches + patch_at;
    patch_at = patch_bytes - patch_at;
    wait_copies<0>();
    if constexpr (M == Math::kTf32) {  // what this thread has copied
      for (int i = threadIdx.x; i < few.patch_h * few.patch_w; i += kFewThreads) {
        uint4& part = reinterpret_cast<uint4*>(patch)[i];
        part = {rounded_tf32(part.x), rounded_tf32(part.y), rounded_tf32(part.z), rounded_tf32(part.w)};
      }
    }
    __syncthreads();  // and the tile before is read
    const FewTile next(few, tile + gridDim.x);
    if (tile + int(gridDim.x) < few.tiles) copy_rows<T>(few, next, patches + patch_at);
    commit_copies();

    sums.start();
    const uint4* b = reinterpret_cast<const uint4*>(shared) + lane;
    for (int down = 0; down < p.kernel_h; ++down) {
      const unsigned char* a = patch + first + down * p.dilation_h * row_bytes;
      for (int step = 0; step <= last; ++step, a += kStep, b += kFewStepBytes / 16) {
        const uint32_t mask = step == last ? last_mask : step == 0 && kElements > 1 ? first_mask : ~0u;
        const uint32_t next_mask = step == last ? last_next_mask : ~0u;
        uint32_t words[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned char* from = a + i * p.stride_h * row_bytes;
          const auto word = [from](int at) { return *reinterpret_cast<const uint32_t*>(from + at); };
          words[i][0] = word(0) & mask;
          words[i][1] = word(eight) & mask;
          words[i][2] = word(kStep / 2) & next_mask;
          words[i][3] = word(kStep / 2 + eight) & next_mask;
        }
        sums.add(words, b);
      }
    }
    sums.store(at, exchange);
    at = next;
  }
}

}  // namespace ai3

#endif
