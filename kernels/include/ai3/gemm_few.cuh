// The convolution of images of up to four channels, as the first of a network mostly is, as an implicit GEMM whose
// im2col matrix is read out of the tile's part of the image in shared memory: as it lies where whole 16-byte parts of
// its rows can be copied (gemm_few_rows.cuh), else by pixels of four channels each (gemm_few_pixels.cuh).
// Source: as gemm_tile.cuh. The depth is the window's rows, each in whole steps of an instruction, so that what a
// thread gives an instruction is one word at a fixed place of the tile; weights are packed in the order in which the
// threads of a warp give them: [64 columns][step][four pairs of 8 columns][lane][4 words].
#pragma once

#include <ai3/gemm_tile.cuh>

namespace ai3 {

constexpr int kFewRows = 8, kFewColumns = 16;  // output pixels of a tile: two rows a warp
constexpr int kFewThreads = kFewRows / 2 * 32, kFewStepBytes = 2048, kFewExchange = kFewThreads * 64 * 4;

struct FewParams {
  GemmParams gemm;
  int32_t steps, row_steps;  // of instructions: of the window and of one of its rows
  int32_t patch_h, patch_w;  // of the image that a tile reads: rows, and pixels or 16-byte parts of one
  int32_t tiles, tile_rows, tile_columns;
  // Of gemm_few_rows.cuh: elements of a row before a tile's first, which the row's first part begins with, and how many
  // of these the depth begins with; whether the image may be read by whole parts.
  int32_t lead, shift, is_aligned;
};

struct FewPackParams {
  const void* weight;
  void* packed;
  int32_t total;  // 16-byte parts
  int32_t columns, channels, kernel_h, kernel_w, steps, row_steps;
  int32_t pixel, shift;  // elements of the depth that a pixel has, and those before a row's first
};

}  // namespace ai3

#ifdef __CUDACC__

namespace ai3 {

// Where a tile is: its image, and its first pixel of the output.
struct FewTile {
  int image, y, x;

  __device__ __forceinline__ FewTile(const FewParams& few, int tile) {
    const int of_image = few.tile_rows * few.tile_columns, rest = tile % of_image;
    image = tile / of_image;
    y = rest / few.tile_columns * kFewRows, x = rest % few.tile_columns * kFewColumns;
  }
};

// A warp's sums, of two rows of 16 pixels by 64 channels: how they begin, grow and end.
template <Math M>
struct FewSums {
  using T = typename ElementOf<M>::type;
  static constexpr int kCount = 16 / sizeof(T), kRuns = 16 / kCount;
  const GemmParams& p;
  const int lane = threadIdx.x % 32, column = int(blockIdx.y) * 64 + lane % 4 * kCount;
  // Where the end of a sum is no more than its bias and a clamp, it starts with the bias.
  const bool is_plain = p.is_clamp && p.aligned && p.residual == nullptr;
  float sums[2][32];

  __device__ __forceinline__ void start() {
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
  }

  // One step of the depth: of both rows the words, and the weights of a step as they are packed.
  __device__ __forceinline__ void add(const uint32_t (&words)[2][4], const uint4* weights) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint4 w = weights[pair * 32];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma<M>(&sums[i][pair * 8], words[i], w.x, w.y);
        mma<M>(&sums[i][pair * 8 + 4], words[i], w.z, w.w);
      }
    }
  }

  // Ends that are not plain exchange sums in shared memory, which must be free: kFewExchange bytes.
  __device__ __forceinline__ void store(const FewTile& tile, unsigned char* exchange) {
    const int x = tile.x + lane / 4, y = tile.y + 2 * int(threadIdx.x / 32);
    const auto inside = [&](int i, int half) { return y + i < p.out_height && x + half * 8 < p.out_width; };
    if (is_plain) {
      T* to =
          static_cast<T*>(p.output) + (int64_t(tile.image) * p.out_pixels + y * p.out_width + x) * p.out_pixel + column;
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
      return;
    }
    // Other ends are too long to be unrolled.
    const GemmEnd<T> end{p, 0};
    auto* sum_of = reinterpret_cast<float2*>(exchange) + threadIdx.x;
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
      const int row = tile.image * p.out_pixels + (y + i) * p.out_width + x + half * 8;
      end.template store<false>(inside(i, half) ? row : p.rows, column + run * kCount * 4, v);
    }
  }
};

// Begins to copy a block's weights to shared memory.
__device__ __forceinline__ void few_weights(const FewParams& few, unsigned char* to) {
  const int parts = few.steps * (kFewStepBytes / 16);
  const auto* packed = static_cast<const uint4*>(few.gemm.packed) + int64_t(blockIdx.y) * parts;
  for (int i = threadIdx.x; i < parts; i += kFewThreads) copy_async(shared_address(to) + i * 16, packed + i);
}

// Writes one 16-byte part of the packed weights: what a lane gives for two times 8 columns in one step.
template <typename Bits>
__device__ __forceinline__ void pack_few(const FewPackParams& p) {
  constexpr bool kHalf = sizeof(Bits) == 2;
  constexpr int kCount = 16 / sizeof(Bits), kElements = 4 / sizeof(Bits);
  const int index = int(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.total) return;
  const int lane = index % 32, pair = index / 32 % 4, step = index / 128 % p.steps, tile = index / 128 / p.steps;
  const int down = step / p.row_steps, first = step % p.row_steps * 8 * kElements - p.shift;
  uint32_t words[4] = {};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    // As in pack_gemm(), a thread's sums are of neighbouring channels.
    const int column = (pair * 2 + w / 2) * 8 + lane / 4, in_run = column % (4 * kCount);
    const int output = tile * 64 + column - in_run + in_run % 8 / 2 * kCount + in_run / 8 * 2 + in_run % 2;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int depth = first + lane % 4 * kElements + e + w % 2 * 4 * kElements;
      const int tap = depth / p.pixel, channel = depth % p.pixel;
      if (depth < 0 || tap >= p.kernel_w || channel >= p.channels || output >= p.columns) continue;
      const int64_t at = ((int64_t(output) * p.channels + channel) * p.kernel_h + down) * p.kernel_w + tap;
      const uint32_t bits = static_cast<const Bits*>(p.weight)[at];
      words[w] |= kHalf ? bits << (e * 16) : rounded_tf32(bits);
    }
  }
  static_cast<uint4*>(p.packed)[index] = {words[0], words[1], words[2], words[3]};
}

}  // namespace ai3

#endif
