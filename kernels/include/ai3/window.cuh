// What the kernels that walk over elements and windows on a GPU share: vectors of 16 bytes, the epilogue on registers,
// division by what is fixed at launch, and how output pixels by vectors of channels are shared out to blocks of
// threads.
#pragma once

#include <ai3/cuda.h>

#ifdef __CUDACC__
#include <ai3/activation.cuh>
#include <ai3/half.cuh>
#else
#include <algorithm>

#endif

namespace ai3 {

constexpr int kWindowThreads = 256;  // of a block, at most
constexpr int kVectorBytes = 16;

// Divides numbers below 2^31. Source: Granlund and Montgomery, "Division by Invariant Integers using Multiplication",
// PLDI 1994.
struct Divider {
  unsigned divisor, multiplier, shift;
#ifdef __CUDACC__
  __device__ __forceinline__ unsigned divide(unsigned n, unsigned& rest) const {
    const unsigned quotient = (__umulhi(n, multiplier) + n) >> shift;
    rest = n - quotient * divisor;
    return quotient;
  }
#endif
};

// An image's outputs in blocks of pixels by vectors of channels, and those in tiles, one for each block of threads: its
// threads go along the channels, then along a row, then down.
struct Tiles {
  Divider lanes, columns;               // threads of a tile along the channels and along a row
  Divider channel_tiles, column_tiles;  // tiles of an image
  int32_t threads;                      // of a tile
  int32_t tile_rows;                    // threads of a tile down the image
  int32_t vectors, row_blocks, column_blocks;
};

// Of an image, in elements.
struct Strides {
  int64_t image, channel, row, column;
};

#ifdef __CUDACC__

template <typename T, int N>
struct alignas(sizeof(T) * N) Lanes {
  T at[N];
};
template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <int N, typename T>
__device__ __forceinline__ Lanes<T, N> load_lanes(const T* p) {
  return *reinterpret_cast<const Lanes<T, N>*>(p);
}

template <int N, typename T>
__device__ __forceinline__ void store_lanes(T* p, const Accumulator<T> (&x)[N]) {
  Lanes<T, N> lanes;
#pragma unroll
  for (int i = 0; i < N; ++i) lanes.at[i] = narrow<T>(x[i]);
  *reinterpret_cast<Lanes<T, N>*>(p) = lanes;
}

__device__ __forceinline__ bool is_double(float) { return false; }
__device__ __forceinline__ bool is_double(double) { return true; }

// f(x) for sums in registers, Step of them at a time in a loop that is not unrolled: all move up by Step each time.
template <int Step, int N, int L, typename S, typename F>
__device__ __forceinline__ void rotate_through(S (&x)[N][L], const F& f) {
  static_assert(N * L % Step == 0);
#pragma unroll 1
  for (int i = 0; i < N * L; i += Step) {
    S first[Step];
#pragma unroll
    for (int j = 0; j < Step; ++j) first[j] = f(x[j / L][j % L]);
#pragma unroll
    for (int j = 0; j + Step < N * L; ++j) x[j / L][j % L] = x[(j + Step) / L][(j + Step) % L];
#pragma unroll
    for (int j = 0; j < Step; ++j) x[(N * L - Step + j) / L][(N * L - Step + j) % L] = first[j];
  }
}

// Of N rows of sums in registers. Only the cheap activations are unrolled: the others would be more code, and take more
// registers, than all the rest.
template <int N, int L, typename S>
__device__ __forceinline__ void activate_all(S (&x)[N][L], int activation) {
  constexpr int kFew = 32;
  const auto each = [&](auto f) {
    if constexpr (N * L > kFew) {
      rotate_through<L>(x, f);
    } else {
#pragma unroll
      for (int i = 0; i < N * L; ++i) x[i / L][i % L] = f(x[i / L][i % L]);
    }
  };
  if (activation == kIdentity) return;
  if (activation == kRelu) return each([](S v) { return v < S(0) ? S(0) : v; });
  if (activation <= kHardsigmoid) {
    const S shift = activation == kRelu6 ? S(0) : S(3), scale = activation == kRelu6 ? S(1) : S(1.0 / 6);
    const bool gates = activation == kHardswish;
    return each([=](S v) { return (gates ? v : S(1)) * (clamp(v + shift, S(0), S(6)) * scale); });
  }
  if constexpr (sizeof(S) == sizeof(float)) {
    const bool gates = activation == kSilu;
    const auto sigmoid = [=](S v) { return __fdividef(gates ? v : 1.0f, 1.0f + __expf(-v)); };
    if (activation <= kSilu) return rotate_through<L>(x, sigmoid);
  }
  rotate_through<1>(x, [=](S v) { return activate(v, activation); });
}

// The block of pixels and the vector that are this thread's; false where it has none.
struct TilePlace {
  int vector, row_block, column_block;
  __device__ __forceinline__ bool find(const Tiles& t) {
    unsigned lane, column, channel_tile, column_tile;
    const int row = int(t.columns.divide(t.lanes.divide(threadIdx.x, lane), column));
    const int row_tile = int(t.column_tiles.divide(t.channel_tiles.divide(blockIdx.x, channel_tile), column_tile));
    vector = int(channel_tile * t.lanes.divisor + lane);
    column_block = int(column_tile * t.columns.divisor + column);
    row_block = row_tile * t.tile_rows + row;
    return row < t.tile_rows && vector < t.vectors && column_block < t.column_blocks && row_block < t.row_blocks;
  }
};

// f(suffix, type) for each dtype; dtype_name() below gives the same suffixes.
#define AI3_FOR_DTYPES(f) f(f32, float) f(f64, double) f(f16, ai3::Half) f(bf16, ai3::BFloat16)

#else

inline Divider divider(int64_t divisor) {
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t over = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>((over << 32) / static_cast<uint64_t>(divisor) + 1),
          shift};
}

// The name of a kernel for this dtype.
inline std::string dtype_name(const char* name, ai3_dtype dtype) {
  constexpr const char* kSuffix[] = {"f32", "f64", "f16", "bf16"};
  return std::string(name) + "_" + kSuffix[dtype];
}

inline int64_t dtype_bytes(ai3_dtype dtype) { return dtype == AI3_FLOAT64 ? 8 : dtype == AI3_FLOAT32 ? 4 : 2; }

inline Strides strides_of(const ai3_tensor& t) { return {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}; }

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

// The channels of a vector where this image can be read or written in vectors of 16 bytes of channels, else 1.
inline int64_t vector_lanes(ai3_dtype dtype, const ai3_tensor& t) {
  const int64_t lanes = kVectorBytes / dtype_bytes(dtype);
  const bool whole =
      t.size[1] % lanes == 0 && t.stride[0] % lanes == 0 && t.stride[2] % lanes == 0 && t.stride[3] % lanes == 0;
  return t.stride[1] == 1 && whole && is_aligned(t.data) ? lanes : 1;
}

// As few tiles as cover the image, of threads that share much of what they read; small ones where the GPU has room.
inline Tiles make_tiles(int64_t images, int64_t vectors, int64_t row_blocks, int64_t column_blocks) {
  constexpr int64_t kWarp = 32, kFewBlocks = 264, kFewThreads = 64;
  const int64_t channel_tiles = cuda::ceil_div(vectors, kWarp), lanes = cuda::ceil_div(vectors, channel_tiles);
  for (int64_t threads = kWindowThreads;; threads /= 2) {
    const int64_t pixels = std::max<int64_t>(1, threads / lanes);
    int64_t best_rows = 1, best_columns = 1;
    double best = -1;
    for (int64_t rows = 1; rows <= std::min(pixels, row_blocks); ++rows) {
      const int64_t columns = std::min(pixels / rows, column_blocks);
      const int64_t tiles = cuda::ceil_div(row_blocks, rows) * cuda::ceil_div(column_blocks, columns);
      const double cost = static_cast<double>(tiles) *
                          (static_cast<double>((rows + 1) * (columns + 1)) + 0.5 * static_cast<double>(pixels));
      if (best < 0 || cost < best) best = cost, best_rows = rows, best_columns = columns;
    }
    const int64_t column_tiles = cuda::ceil_div(column_blocks, best_columns);
    const int64_t blocks = images * channel_tiles * column_tiles * cuda::ceil_div(row_blocks, best_rows);
    if (threads > kFewThreads && blocks < kFewBlocks) continue;
    const int64_t used = lanes * best_rows * best_columns;
    return {divider(lanes),
            divider(best_columns),
            divider(channel_tiles),
            divider(column_tiles),
            static_cast<int32_t>(cuda::ceil_div(used, kWarp) * kWarp),
            static_cast<int32_t>(best_rows),
            static_cast<int32_t>(vectors),
            static_cast<int32_t>(row_blocks),
            static_cast<int32_t>(column_blocks)};
  }
}

// One block of threads a tile and image; a kernel takes every gridDim.y-th image.
inline cuda::Grid tile_grid(const Tiles& t, int64_t images) {
  return {int64_t{t.channel_tiles.divisor} * t.column_tiles.divisor * cuda::ceil_div(t.row_blocks, t.tile_rows),
          std::min<int64_t>(images, 65535)};
}

#endif

}  // namespace ai3
