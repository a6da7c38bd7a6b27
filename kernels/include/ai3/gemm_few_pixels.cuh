// The convolution of few channels (gemm_few.cuh) whose part of the image lies in shared memory by pixels of four
// channels, whatever their stride, dilation and place are in memory.
#pragma once

#include <ai3/gemm_few.cuh>

#ifdef __CUDACC__

namespace ai3 {

// Pixels that a thread reads before it writes them: of the next tile, and of the rest of this one.
constexpr int kFewAhead = 2, kFewAtOnce = 4;

__device__ __forceinline__ unsigned short few_rounded(unsigned short bits) { return bits; }
__device__ __forceinline__ uint32_t few_rounded(uint32_t bits) { return rounded_tf32(bits); }

// A pixel in shared memory.
template <typename T>
struct alignas(4 * sizeof(T)) FewPixel {
  T at[4];
};

// The part of an image that a tile reads, on its way to shared memory: N pixels of each thread at once, from the
// `from`-th of the part on.
template <typename Bits>
struct FewPatch {
  const FewParams& few;
  FewPixel<Bits>* to;

  template <int N>
  __device__ __forceinline__ void fetch(FewPixel<Bits> (&pixels)[N], int tile, int from) const {
    const GemmParams& p = few.gemm;
    const FewTile at(few, tile);
    const int top = at.y * p.stride_h - p.pad_top, left = at.x * p.stride_w - p.pad_left;
    const Bits* input = static_cast<const Bits*>(p.input) + int64_t(at.image) * p.height * p.width * p.in_pixel;
    const int row_step = kFewThreads / few.patch_w, column_step = kFewThreads % few.patch_w;
    int row = from / few.patch_w, column = from % few.patch_w;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const int y = top + row, x = left + column;
      const bool inside = unsigned(y) < unsigned(p.height) && unsigned(x) < unsigned(p.width) && row < few.patch_h;
      const Bits* pixel = input + (int64_t(y) * p.width + x) * p.in_pixel;
#pragma unroll
      for (int c = 0; c < 4; ++c) pixels[k].at[c] = load_where(pixel + c, inside && c < p.channels);
      row += row_step, column += column_step;
      if (column >= few.patch_w) column -= few.patch_w, ++row;
    }
  }

  template <int N>
  __device__ __forceinline__ void put(FewPixel<Bits> (&pixels)[N], int from) const {
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
      for (int c = 0; c < 4; ++c) pixels[k].at[c] = few_rounded(pixels[k].at[c]);
      if (from + k * kFewThreads < few.patch_h * few.patch_w) to[from + k * kFewThreads] = pixels[k];
    }
  }
};

template <Math M>
__device__ __forceinline__ void few_by_pixels(const FewParams& few) {
  using T = typename ElementOf<M>::type;
  constexpr bool kHalf = sizeof(T) == 2;
  using Bits = typename BitsOf<T>::type;
  constexpr int kTaps = kHalf ? 4 : 2;
  const GemmParams& p = few.gemm;
  extern __shared__ __align__(1024) unsigned char shared[];
  unsigned char* const patch = shared + few.steps * kFewStepBytes;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

#if AI3_WGMMA
  wait_previous_grid();
#endif
  few_weights(few, shared);
  commit_copies();

  // Where this thread's words are from its first pixel on, and of which taps of a step.
  const int tap = kHalf ? lane % 4 / 2 : 0, next_tap = tap + kTaps / 2;
  const int within = (kHalf ? lane % 2 * 2 : lane % 4) * int(sizeof(T));
  const int tap_bytes = p.dilation_w * int(sizeof(FewPixel<T>)), row_bytes = few.patch_w * int(sizeof(FewPixel<T>));
  const int eight = 8 * p.stride_w * int(sizeof(FewPixel<T>));
  const int first = (lane / 4 * p.stride_w + 2 * warp * p.stride_h * few.patch_w) * int(sizeof(FewPixel<T>)) +
                    tap * tap_bytes + within;

  FewSums<M> sums{p};
  const FewPatch<Bits> part{few, reinterpret_cast<FewPixel<Bits>*>(patch)};
  FewPixel<Bits> first_pixels[kFewAhead];  // of the next tile, which come while one is computed
  part.fetch(first_pixels, blockIdx.x, thread);
  for (int tile = blockIdx.x; tile < few.tiles; tile += gridDim.x) {
    const FewTile at(few, tile);
    __syncthreads();  // the last tile's part of the image is read
    part.put(first_pixels, thread);
    for (int i = thread + kFewAhead * kFewThreads; i < few.patch_h * few.patch_w; i += kFewAtOnce * kFewThreads) {
      FewPixel<Bits> pixels[kFewAtOnce];
      part.fetch(pixels, tile, i);
      part.put(pixels, i);
    }
    wait_copies<0>();
    __syncthreads();
    if (tile + int(gridDim.x) < few.tiles) part.fetch(first_pixels, tile + gridDim.x, thread);

    sums.start();
    const uint4* b = reinterpret_cast<const uint4*>(shared) + lane;
    for (int down = 0; down < p.kernel_h; ++down) {
      const unsigned char* a = patch + first + down * p.dilation_h * row_bytes;
      for (int step = 0; step < few.row_steps; ++step, a += kTaps * tap_bytes, b += kFewStepBytes / 16) {
        // A tap behind the window's last has no weight, and a pixel that may be no number.
        const bool inside = step * kTaps + tap < p.kernel_w, next_inside = step * kTaps + next_tap < p.kernel_w;
        uint32_t words[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned char* from = a + i * p.stride_h * row_bytes;
          const auto word = [from](int at) { return *reinterpret_cast<const uint32_t*>(from + at); };
          words[i][0] = inside ? word(0) : 0;
          words[i][1] = inside ? word(eight) : 0;
          words[i][2] = next_inside ? word(kTaps / 2 * tap_bytes) : 0;
          words[i][3] = next_inside ? word(kTaps / 2 * tap_bytes + eight) : 0;
        }
        sums.add(words, b);
      }
    }
    if (!sums.is_plain) __syncthreads();
    sums.store(at, patch);
  }
}

}  // namespace ai3

#endif
