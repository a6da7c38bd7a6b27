// One block's share of a convolution as an implicit GEMM on tensor cores: a tile of output pixels by output channels,
// whose rows of the im2col matrix are read in place (a matrix product is the convolution of 1x1 images).
// Source: Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", arXiv 1410.0759.
// The depth is the taps of the window, each with its channels, in blocks of 128 bytes a row; packed weights are
// [group][block of depth][part][column][128 bytes], the 16-byte parts of a row permuted by the column modulo 8 as they
// lie in shared memory, and the columns permuted so that a thread's sums are of neighbouring channels.
// Strict float32 is 3xTF32 (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores", IJHPCA 2022):
// a = high + low in TF32 each, a b = low high + high low + high high. Tensor cores truncate the sums that they add to,
// so those of one block of depth are added to the rest by ordinary additions. Measured against float64 its error was at
// most 3e-7 by Frobenius norms, with up to 4608 terms a sum; an infinity in the input or the weight gives NaN.
#pragma once

#include <ai3/cuda.h>

namespace ai3 {

struct GemmParams {
  alignas(64) unsigned char tensor_map[128];  // the CUtensorMap of the input, where it is read by one
  const void *input, *packed, *bias, *residual;
  void* output;
  int64_t in_pixel, out_pixel;      // elements from a pixel to the next
  int64_t packed_group;             // bytes of the packed weights of a group
  int32_t rows, columns, channels;  // pixels; output and input channels of a group
  int32_t packed_columns, blocks;   // columns with their padding; blocks of depth
  int32_t column_tiles, groups;
  int32_t height, width, out_pixels, out_width, out_height;
  int32_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  // From a block of depth to the next: where each is of one tap, the next column of the window, then the next channels,
  // then the next row; else as many channels, columns and rows on.
  int32_t one_tap, tap_blocks, channel_step, column_step, row_step;
  int32_t is_matrix;  // the tensor map's two dimensions are channels and rows
  // Of gemm_halo.cuh: tiles of an image, pixels and bytes of a tile's part of the image, and how many are there at
  // once.
  int32_t tiles_down, tiles_right, halo_height, halo_width, halo_bytes, halo_slots;
  int32_t pools;  // of each 2x2 pixels the largest is written
  int32_t tiles;  // of gemm_resident.cuh and gemm_stream.cuh, for each group's columns

  int32_t stages, slots, ahead;  // of blocks of depth in shared memory; those that are used; those being copied
  int32_t barriers;              // where they are in shared memory: behind whatever else is there, at any time
  int32_t activation, is_clamp;
  float low, high;                              // of the clamp that the activation is
  const void *prologue_scale, *prologue_shift;  // [input channels], or null
  float prologue_low;                           // of the clamp that is the prologue's activation
  int32_t aligned;                              // 16-byte parts of outputs, residuals and biases may be accessed whole
};

struct GemmPackParams {
  const void* weight;
  void* packed;
  int64_t total;  // 16-byte parts of one part of the split
  int32_t columns, channels, kernel_h, kernel_w, packed_columns, blocks, one_tap, tap_blocks;
  int32_t joined;  // taps of a row of the window whose channels are a tap's
};

constexpr int kMostSplits = 8;      // shares of the depth: blocks of a cluster
constexpr int kResidentTeams = 3;   // warpgroups of gemm_resident.cuh
constexpr int kBulkBarriers = 256;  // bytes behind the blocks of depth, and behind these the prologue's of each channel
constexpr int kThinRows = 16, kThinColumns = 64, kThinWarps = 8;  // of gemm_thin.cuh

}  // namespace ai3

#ifdef __CUDACC__

#include <ai3/activation.cuh>
#include <ai3/gemm_parts.cuh>
#include <ai3/mma.cuh>

namespace ai3 {

// Bias, residual and activation of neighbouring channels of one pixel, and their store.
template <typename T>
struct GemmEnd {
  static constexpr int kCount = 16 / sizeof(T);
  const GemmParams& p;
  int group;

  template <bool IsClamp>
  __device__ __forceinline__ float activated(float x) const {
    if constexpr (IsClamp) return at_most(at_least(x, p.low), p.high);
    return activate(x, p.activation);
  }

  template <bool IsClamp>
  __device__ __forceinline__ void store(int row, int column, float (&v)[kCount]) const {
    if (row >= p.rows || column >= p.columns) return;
    const int channel = group * p.columns + column;
    T* to = static_cast<T*>(p.output) + row * p.out_pixel + channel;
    const T* bias = static_cast<const T*>(p.bias);
    const T* residual = static_cast<const T*>(p.residual);
    if (residual) residual += row * p.out_pixel + channel;
    if (p.aligned) {
      if (residual) Part<T>{*reinterpret_cast<const uint4*>(residual)}.add_to(v);
      if (bias) Part<T>{__ldg(reinterpret_cast<const uint4*>(bias + channel))}.add_to(v);
      if constexpr (!IsClamp) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) v[i] = activated<false>(v[i]);
      }
      const Part<T> part = Part<T>::of(v);
      *reinterpret_cast<uint4*>(to) = (IsClamp ? part.clamped(p.low, p.high) : part).words;
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (column + i >= p.columns) return;
      float x = v[i];
      if (bias) x += widen(bias[channel + i]);
      if (residual) x += widen(residual[i]);
      to[i] = narrow<T>(activated<IsClamp>(x));
    }
  }
};

// The address of a row's 16-byte part in a swizzled tile.
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, int row, int part) {
  return tile + row * 128 + ((part ^ (row & 7)) << 4);
}

constexpr int kOutside = -(1 << 30);

// A place in the depth: a channel of a tap. Where a block is of one tap, its channels may end before it does.
struct GemmDepth {
  int channel, in_block, tap_w, tap_h;

  __device__ __forceinline__ void start(const GemmParams& p, int block, int within, int block_size) {
    if (p.one_tap) {
      const int row = block / p.kernel_w;
      tap_w = block - row * p.kernel_w;
      tap_h = row / p.tap_blocks;
      channel = (row - tap_h * p.tap_blocks) * block_size;
      in_block = within;
      return;
    }
    const int depth = block * block_size + within, tap = depth / p.channels;
    channel = depth - tap * p.channels;
    in_block = 0;
    tap_h = tap / p.kernel_w;
    tap_w = tap - tap_h * p.kernel_w;
  }

  __device__ __forceinline__ void next_block(const GemmParams& p, int block_size) {
    if (p.one_tap) {
      if (++tap_w < p.kernel_w) return;
      tap_w = 0;
      channel += block_size;
      if (channel >= p.channels) channel = 0, ++tap_h;
      return;
    }
    channel += p.channel_step;
    tap_w += p.column_step;
    tap_h += p.row_step;
    if (channel >= p.channels) channel -= p.channels, ++tap_w;
    if (tap_w >= p.kernel_w) tap_w -= p.kernel_w, ++tap_h;
  }

  __device__ __forceinline__ bool inside(const GemmParams& p) const {
    return tap_h < p.kernel_h && channel + in_block < p.channels;
  }
};

// A row of the im2col matrix: an output pixel's window.
template <typename T>
struct GemmRow {
  const T* from;
  int top, left;

  __device__ __forceinline__ void start(const GemmParams& p, int row, int group) {
    const int image = row / p.out_pixels, pixel = row - image * p.out_pixels;
    const int y = pixel / p.out_width, x = pixel - y * p.out_width;
    left = x * p.stride_w - p.pad_left;
    top = y * p.stride_h - p.pad_top;
    from = static_cast<const T*>(p.input) + ((int64_t(image) * p.height + top) * p.width + left) * p.in_pixel +
           group * p.channels;
    if (row >= p.rows) top = kOutside;
  }
  __device__ __forceinline__ bool inside(const GemmParams& p, int down, int right) const {
    return unsigned(top + down) < unsigned(p.height) && unsigned(left + right) < unsigned(p.width);
  }
};

// How the sums of a tile lie in the registers of its warps: kRowParts times kColumnParts matrices of instructions.
template <int Rows, int Columns, int Warps>
struct GemmLayout {
#if AI3_WGMMA
  static constexpr int kColumnParts = Columns > 128 ? Columns / 128 : 1, kPartColumns = Columns / kColumnParts;
  static constexpr int kRowParts = Rows * 4 / (64 * Warps), kRowStep = 64;
  static __device__ __forceinline__ int row(int warp) { return warp / 4 * 64 * kRowParts + warp % 4 * 16; }
  static __device__ __forceinline__ int column(int) { return 0; }
#else
  static constexpr int kWarpRows = Rows >= 2 * Columns ? 4 : 2, kWarpColumns = Warps / kWarpRows;
  static constexpr int kColumnParts = 1, kPartColumns = Columns / kWarpColumns;
  static constexpr int kRowParts = Rows / kWarpRows / 16, kRowStep = 16;
  static __device__ __forceinline__ int row(int warp) { return warp / kWarpColumns * (Rows / kWarpRows); }
  static __device__ __forceinline__ int column(int warp) { return warp % kWarpColumns * kPartColumns; }
#endif
  // For finish_gemm(), where a tile's rows follow each other from `first` on.
  static __device__ __forceinline__ auto rows_from(int first) {
    const int row = first + GemmLayout::row(int(threadIdx.x) / 32) + int(threadIdx.x) % 32 / 4;
    return [row](int i, int half) { return row + i * kRowStep + half * 8; };
  }
};

#if AI3_WGMMA
// Starts the products of one block of depth.
template <Math M, int Rows, int Columns, int Warps, typename Sums>
__device__ __forceinline__ void multiply_tile(Sums& sums, uint32_t tile, int warp, bool accumulate) {
  using Layout = GemmLayout<Rows, Columns, Warps>;
  const uint64_t a = matrix_descriptor(tile + warp / 4 * Layout::kRowParts * 64 * 128);
  const uint64_t b = matrix_descriptor(tile + Rows * 128);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int i = 0; i < Layout::kRowParts; ++i) {
#pragma unroll
      for (int j = 0; j < Layout::kColumnParts; ++j) {
        wgmma<M, Layout::kPartColumns>(sums[i][j], a + (i * 64 * 128 + k * 32) / 16,
                                       b + (j * Layout::kPartColumns * 128 + k * 32) / 16, k > 0 || accumulate);
      }
    }
  }
  wgmma_commit();
}

#endif

// The end of a tile whose sums go to memory as they are in registers, as those of finish_gemm().
template <typename T, typename Layout, typename Sums, typename RowOf>
__device__ __forceinline__ void finish_directly(const GemmParams& p, const Sums& sums, const RowOf& row_of,
                                                int first_column, int group) {
  constexpr int kCount = 16 / sizeof(T), kRuns = Layout::kPartColumns / kCount / 4;
  const GemmEnd<T> end{p, group};
  const int column = first_column + Layout::column(int(threadIdx.x) / 32) + int(threadIdx.x) % 4 * kCount;
#pragma unroll
  for (int i = 0; i < Layout::kRowParts; ++i) {
#pragma unroll
    for (int j = 0; j < Layout::kColumnParts; ++j) {
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float v[kCount];
#pragma unroll
          for (int e = 0; e < kCount; ++e) v[e] = sums[i][j][(run * kCount / 2 + e / 2) * 4 + half * 2 + e % 2];
          end.template store<true>(row_of(i, half), column + j * Layout::kPartColumns + run * kCount * 4, v);
        }
      }
    }
  }
}

// The end of a tile, whose sums are in the registers of its Warps warps; `computes` is false in any others. The rows of
// a thread's sums are row_of(i, half), of the i-th instruction the first or second eight.
template <typename T, int Rows, int Columns, int Warps, typename Sums, typename RowOf>
__device__ __forceinline__ void finish_gemm(const GemmParams& p, const Sums& sums, const RowOf& row_of,
                                            int first_column, int group, unsigned char* shared, bool computes) {
  using Layout = GemmLayout<Rows, Columns, Warps>;
  constexpr int kThreads = Warps * 32, kCount = 16 / sizeof(T), kPartSums = Layout::kPartColumns / 2;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const GemmEnd<T> end{p, group};
  const int column = first_column + Layout::column(warp) + lane % 4 * kCount;
  constexpr int kRuns = kPartSums / kCount / 2;  // of channels in a row of one instruction's sums
  if (gridDim.z == 1 && p.is_clamp) {
    if (computes) finish_directly<T, Layout>(p, sums, row_of, first_column, group);
    return;
  }

  // Other activations are too long to be unrolled, and the blocks of a cluster exchange their sums: through shared
  // memory, each thread's sums in the same place in every block.
  __syncthreads();
#pragma unroll
  for (int i = 0; computes && i < Layout::kRowParts; ++i) {
#pragma unroll
    for (int j = 0; j < Layout::kColumnParts; ++j) {
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int unit = ((i * Layout::kColumnParts + j) * kRuns + run) * 2 + half;
#pragma unroll
          for (int e = 0; e < kCount; e += 4) {
            const float* s = &sums[i][j][(run * kCount / 2 + e / 2) * 4 + half * 2];
            reinterpret_cast<float4*>(shared)[(unit * (kCount / 4) + e / 4) * kThreads + thread] =
                make_float4(s[0], s[1], s[4], s[5]);
          }
        }
      }
    }
  }
  constexpr int kUnits = Layout::kRowParts * Layout::kColumnParts * kRuns * 2;
  int first = 0;
#if AI3_WGMMA

  if (gridDim.z > 1) {
    first = int(blockIdx.z);
    cluster_barrier();
  }
#endif
#pragma unroll 1
  for (int unit = first; computes && unit < kUnits; unit += gridDim.z) {
    float v[kCount] = {};
#pragma unroll
    for (int e = 0; e < kCount; e += 4) {
      const int at = (unit * (kCount / 4) + e / 4) * kThreads + thread;
#if AI3_WGMMA
      float4 parts[kMostSplits];
#pragma unroll
      for (int rank = 0; rank < kMostSplits; ++rank) {
        if (rank < gridDim.z) parts[rank] = load_of_block(shared_address(shared) + at * 16, rank);
      }
#pragma unroll
      for (int rank = 0; rank < kMostSplits; ++rank) {
        if (rank >= gridDim.z) break;
        v[e] += parts[rank].x, v[e + 1] += parts[rank].y, v[e + 2] += parts[rank].z, v[e + 3] += parts[rank].w;
      }
#else
      const float4 sum = reinterpret_cast<const float4*>(shared)[at];
      v[e] = sum.x, v[e + 1] = sum.y, v[e + 2] = sum.z, v[e + 3] = sum.w;
#endif
    }
    const int half = unit % 2, run = unit / 2 % kRuns, j = unit / 2 / kRuns % Layout::kColumnParts;
    const int i = unit / 2 / kRuns / Layout::kColumnParts;
    end.template store<false>(row_of(i, half), column + j * Layout::kPartColumns + run * kCount * 4, v);
  }
#if AI3_WGMMA
  if (gridDim.z > 1) cluster_barrier();  // the other blocks still read this one's sums
#endif
}

}  // namespace ai3

#endif
