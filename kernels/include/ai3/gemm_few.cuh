// The convolution of images of up to four channels, as the first of a network mostly is, as an implicit GEMM whose
// im2col matrix is read out of the tile's part of the image in shared memory, where pixels have four channels each.
// Source: as gemm_tile.cuh. The depth is the window's rows, each of its taps in whole steps of an instruction, so that
// what a thread gives an instruction is one word at a fixed place of the tile; weights are packed in the order in which
// the threads of a warp give them: [64 columns][step][four pairs of 8 columns][lane][4 words].
#pragma once

#include <ai3/gemm_tile.cuh>

namespace ai3 {

constexpr int kFewRows = 8, kFewColumns = 16;  // output pixels of a tile: two rows a warp
constexpr int kFewThreads = kFewRows / 2 * 32, kFewStepBytes = 2048;
// Pixels that a thread reads before it writes them: of the next tile, and of the rest of this one.
constexpr int kFewAhead = 2, kFewAtOnce = 4;

struct FewParams {
  GemmParams gemm;
  int32_t steps, row_steps;  // of instructions: of the window and of one of its rows
  int32_t patch_h, patch_w;  // pixels of the image that a tile reads
  int32_t tiles, tile_rows, tile_columns;
};

struct FewPackParams {
  const void* weight;
  void* packed;
  int32_t total;  // 16-byte parts
  int32_t columns, channels, kernel_h, kernel_w, steps, row_steps;
};

}  // namespace ai3

#ifdef __CUDACC__

namespace ai3 {

// A pixel in shared memory.
template <typename T>
struct alignas(4 * sizeof(T)) FewPixel {
  T at[4];
};

__device__ __forceinline__ unsigned short few_rounded(unsigned short bits) { return bits; }
__device__ __forceinline__ uint32_t few_rounded(uint32_t bits) { return rounded_tf32(bits); }

// The part of an image that a tile reads, on its way to shared memory: N pixels of each thread at once, from the
// `from`-th of the part on.
template <typename Bits>
struct FewPatch {
  const FewParams& few;
  FewPixel<Bits>* to;

  template <int N>
  __device__ __forceinline__ void fetch(FewPixel<Bits> (&pixels)[N], int tile, int from) const {
    const GemmParams& p = few.gemm;
    const int image = tile / (few.tile_rows * few.tile_columns), rest = tile % (few.tile_rows * few.tile_columns);
    const int top = rest / few.tile_columns * kFewRows * p.stride_h - p.pad_top;
    const int left = rest % few.tile_columns * kFewColumns * p.stride_w - p.pad_left;
    const Bits* input = static_cast<const Bits*>(p.input) + int64_t(image) * p.height * p.width * p.in_pixel;
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
__device__ __forceinline__ void few_channels(const FewParams& few) {
  using T = typename ElementOf<M>::type;
  constexpr bool kHalf = sizeof(T) == 2;
  using Bits = typename BitsOf<T>::type;
  constexpr int kTaps = kHalf ? 4 : 2, kCount = 16 / sizeof(T), kRuns = 16 / kCount;
  const GemmParams& p = few.gemm;
  extern __shared__ __align__(1024) unsigned char shared[];
  const auto* weights = reinterpret_cast<const uint4*>(shared);
  unsigned char* const patch = shared + few.steps * kFewStepBytes;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int first_column = blockIdx.y * 64;

#if AI3_WGMMA
  wait_previous_grid();
#endif
  const auto* packed = static_cast<const uint4*>(p.packed) + int64_t(blockIdx.y) * few.steps * (kFewStepBytes / 16);
  for (int i = thread; i < few.steps * (kFewStepBytes / 16); i += kFewThreads) {
    copy_async(shared_address(shared) + i * 16, packed + i);
  }
  commit_copies();

  // Where this thread's words are from its first pixel on, and of which taps of a step.
  const int tap = kHalf ? lane % 4 / 2 : 0, next_tap = tap + kTaps / 2;
  const int within = (kHalf ? lane % 2 * 2 : lane % 4) * int(sizeof(T));
  const int tap_bytes = p.dilation_w * int(sizeof(FewPixel<T>)), row_bytes = few.patch_w * int(sizeof(FewPixel<T>));
  const int eight = 8 * p.stride_w * int(sizeof(FewPixel<T>));
  const int first = (lane / 4 * p.stride_w + 2 * warp * p.stride_h * few.patch_w) * int(sizeof(FewPixel<T>)) +
                    tap * tap_bytes + within;

  // Where the end of a sum is no more than its bias and a clamp, it starts with the bias.
  const bool is_plain = p.is_clamp && p.aligned && p.residual == nullptr;
  const int column = first_column + lane % 4 * kCount;

  const FewPatch<Bits> part{few, reinterpret_cast<FewPixel<Bits>*>(patch)};
  FewPixel<Bits> first_pixels[kFewAhead];  // of the next tile, which come while one is computed
  part.fetch(first_pixels, blockIdx.x, thread);
  for (int tile = blockIdx.x; tile < few.tiles; tile += gridDim.x) {
    const int image = tile / (few.tile_rows * few.tile_columns), rest = tile % (few.tile_rows * few.tile_columns);
    const int first_y = rest / few.tile_columns * kFewRows, first_x = rest % few.tile_columns * kFewColumns;
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

    float sums[2][32];
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int channel = column + run * kCount * 4;
      Part<T> bias{};
      if (is_plain && p.bias != nullptr && channel < p.columns)
        bias.words = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(p.bias) + channel));
      float start[kCount];
      bias.get(start);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const int at = (run * kCount / 2 + e / 2) * 4 + e % 2;
        sums[0][at] = sums[0][at + 2] = sums[1][at] = sums[1][at + 2] = start[e];
      }
    }
    const uint4* b = weights + lane;
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
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const uint4 w = b[pair * 32];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma<M>(&sums[i][pair * 8], words[i], w.x, w.y);
            mma<M>(&sums[i][pair * 8 + 4], words[i], w.z, w.w);
          }
        }
      }
    }

    const int x = first_x + lane / 4, y = first_y + 2 * warp;
    const auto inside = [&](int i, int half) {
      return y + i < p.out_pixels / p.out_width && x + half * 8 < p.out_width;
    };
    if (is_plain) {
      T* to = static_cast<T*>(p.output) + (int64_t(image) * p.out_pixels + y * p.out_width + x) * p.out_pixel + column;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!inside(i, half)) continue;
          T* pixel = to + (i * p.out_width + half * 8) * p.out_pixel;
#pragma unroll
          for (int run = 0; run < kRuns; ++run) {
            float v[kCount];
#pragma unroll
            for (int e = 0; e < kCount; ++e) v[e] = sums[i][(run * kCount / 2 + e / 2) * 4 + half * 2 + e % 2];
            if (column + run * kCount * 4 < p.columns)
              *reinterpret_cast<uint4*>(pixel + run * kCount * 4) = Part<T>::of(v).clamped(p.low, p.high).words;
          }
        }
      }
      continue;
    }
    // Other ends are too long to be unrolled.
    const GemmEnd<T> end{p, 0};
    __syncthreads();
    auto* sum_of = reinterpret_cast<float2*>(patch) + thread;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int k = 0; k < 16; ++k) sum_of[(i * 16 + k) * kFewThreads] = make_float2(sums[i][2 * k], sums[i][2 * k + 1]);
    }
#pragma unroll 1
    for (int unit = 0; unit < 4 * kRuns; ++unit) {
      const int i = unit / (2 * kRuns), run = unit / 2 % kRuns, half = unit % 2;
      float v[kCount];
#pragma unroll
      for (int e = 0; e < kCount; e += 2) {
        const float2 two = sum_of[(i * 16 + (run * kCount / 2 + e / 2) * 2 + half) * kFewThreads];
        v[e] = two.x, v[e + 1] = two.y;
      }
      const int row = image * p.out_pixels + (y + i) * p.out_width + x + half * 8;
      end.template store<false>(inside(i, half) ? row : p.rows, column + run * kCount * 4, v);
    }
  }
}

// Writes one 16-byte part of the packed weights: what a lane gives for two times 8 columns in one step.
template <typename Bits>
__device__ __forceinline__ void pack_few(const FewPackParams& p) {
  constexpr bool kHalf = sizeof(Bits) == 2;
  constexpr int kCount = 16 / sizeof(Bits), kElements = 4 / sizeof(Bits);
  const int index = int(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.total) return;
  const int lane = index % 32, pair = index / 32 % 4, step = index / 128 % p.steps, tile = index / 128 / p.steps;
  const int down = step / p.row_steps, first_tap = step % p.row_steps * (kHalf ? 4 : 2);
  uint32_t words[4] = {};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    // As in pack_gemm(), a thread's sums are of neighbouring channels.
    const int column = (pair * 2 + w / 2) * 8 + lane / 4, in_run = column % (4 * kCount);
    const int output = tile * 64 + column - in_run + in_run % 8 / 2 * kCount + in_run / 8 * 2 + in_run % 2;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int depth = (lane % 4) * kElements + e + w % 2 * 4 * kElements;
      const int tap = first_tap + depth / 4, channel = depth % 4;
      if (tap >= p.kernel_w || channel >= p.channels || output >= p.columns) continue;
      const int64_t at = ((int64_t(output) * p.channels + channel) * p.kernel_h + down) * p.kernel_w + tap;
      const uint32_t bits = static_cast<const Bits*>(p.weight)[at];
      words[w] |= kHalf ? bits << (e * 16) : rounded_tf32(bits);
    }
  }
  static_cast<uint4*>(p.packed)[index] = {words[0], words[1], words[2], words[3]};
}

#define AI3_FEW(name, math, blocks) \
  AI3_KERNEL_BLOCKS(ai3::kFewThreads, blocks, few_##name, ai3::FewParams) { ai3::few_channels<ai3::Math::math>(p); }
#if AI3_HAS_PART(AI3_PART_FLOAT16)
AI3_FEW(float16, kFloat16, 4)
#endif
#if AI3_HAS_PART(AI3_PART_BFLOAT16)
AI3_FEW(bfloat16, kBFloat16, 4)
#endif
#if AI3_HAS_PART(AI3_PART_FLOAT16) || AI3_HAS_PART(AI3_PART_BFLOAT16)
AI3_KERNEL(256, few_pack_float16, ai3::FewPackParams) { ai3::pack_few<unsigned short>(p); }
#endif
#if AI3_HAS_PART(AI3_PART_TF32)
AI3_FEW(tf32, kTf32, 3)
AI3_KERNEL(256, few_pack_tf32, ai3::FewPackParams) { ai3::pack_few<uint32_t>(p); }
#endif

}  // namespace ai3

#endif
