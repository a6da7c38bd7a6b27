// Depthwise convolution on a GPU. On channels_last images a thread computes a block of output pixels for a vector of
// channels, whose sums stay in registers; the windows that overlap are read once a block.
// Source: the definition; the register blocks follow Zhang, Lo and Lu, "High Performance Depthwise and Pointwise
// Convolutions on Mobile Devices", AAAI 2020, arXiv 2001.02504.
#pragma once

#include <ai3/window.cuh>

namespace ai3 {

constexpr int kDepthwiseLanes = 4;  // channels of a vector where output pixels come in blocks

// Output pixels of a thread: rows and columns.
template <int Stride, bool kLarge>
struct DepthwiseBlock {
  static constexpr int kRows = kLarge ? 2 : 1, kColumns = kLarge && Stride == 1 ? 4 : 2;
};

struct DepthwiseParams {
  const void *in, *weight, *bias, *residual;  // weight: [tap][channel]; bias, residual: or null
  void* out;
  Strides in_stride, out_stride;  // the residual's are the output's
  int32_t images, channels, height, width, out_height, out_width;
  int32_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int32_t activation;
  Tiles tiles;
  Divider out_columns, out_rows;  // for the walk without tiles
};

#ifdef __CUDACC__

// Bias and residual onto the sums of R x C pixels from (p, q) on, the activation, and the stores.
template <int R, int C, int L, typename T>
__device__ __forceinline__ void depthwise_write(const DepthwiseParams& a, Accumulator<T> (&sum)[R * C][L], int n, int p,
                                                int q, int channel) {
  const int64_t at =
      n * a.out_stride.image + p * a.out_stride.row + q * a.out_stride.column + channel * a.out_stride.channel;
  if (a.bias != nullptr) {
    const Lanes<T, L> bias = load_lanes<L>(static_cast<const T*>(a.bias) + channel);
#pragma unroll
    for (int i = 0; i < R * C; ++i) {
#pragma unroll
      for (int j = 0; j < L; ++j) sum[i][j] += widen(bias.at[j]);
    }
  }
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < R * C; ++i) {
      if (p + i / C < a.out_height && q + i % C < a.out_width)
        f(sum[i], at + i / C * a.out_stride.row + i % C * a.out_stride.column);
    }
  };
  if (a.residual != nullptr) {
    each([&](Accumulator<T>(&x)[L], int64_t from) {
      const Lanes<T, L> residual = load_lanes<L>(static_cast<const T*>(a.residual) + from);
#pragma unroll
      for (int j = 0; j < L; ++j) x[j] += widen(residual.at[j]);
    });
  }
  activate_all(sum, a.activation);
  each([&](Accumulator<T>(&x)[L], int64_t to) { store_lanes(static_cast<T*>(a.out) + to, x); });
}

// Kernels of K x K with a stride of S, and no dilation.
template <int K, int S, bool kLarge, typename T>
__device__ __forceinline__ void depthwise_square(const DepthwiseParams& a) {
  constexpr int kRows = DepthwiseBlock<S, kLarge>::kRows, kColumns = DepthwiseBlock<S, kLarge>::kColumns;
  constexpr int L = kDepthwiseLanes, kInRows = (kRows - 1) * S + K, kInColumns = (kColumns - 1) * S + K;
  // Rows at once, where the registers suffice for their loads.
  constexpr int kUnrolled = K == 3 && !(kLarge && S == 1) ? kInRows : 1;
  TilePlace place;
  if (!place.find(a.tiles)) return;
  const int channel = place.vector * L, p = place.row_block * kRows, q = place.column_block * kColumns;
  const int top = p * S - a.pad_top, left = q * S - a.pad_left;
  const T* weight = static_cast<const T*>(a.weight) + channel;
  for (int n = blockIdx.y; n < a.images; n += gridDim.y) {
    const T* in = static_cast<const T*>(a.in) + n * a.in_stride.image + top * a.in_stride.row +
                  left * a.in_stride.column + channel;
    Accumulator<T> sum[kRows * kColumns][L] = {};
#pragma unroll(kUnrolled)
    for (int i = 0; i < kInRows; ++i) {
      const bool inside = unsigned(top + i) < unsigned(a.height);
      Lanes<T, L> x[kInColumns];
#pragma unroll
      for (int j = 0; j < kInColumns; ++j) {
        x[j] = {};
        if (inside && unsigned(left + j) < unsigned(a.width))
          x[j] = load_lanes<L>(in + i * a.in_stride.row + j * a.in_stride.column);
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int r = i - row * S;
        if (r < 0 || r >= K) continue;
#pragma unroll
        for (int s = 0; s < K; ++s) {
          const Lanes<T, L> w = load_lanes<L>(weight + (r * K + s) * a.channels);
#pragma unroll
          for (int column = 0; column < kColumns; ++column) {
#pragma unroll
            for (int l = 0; l < L; ++l)
              sum[row * kColumns + column][l] += widen(w.at[l]) * widen(x[column * S + s].at[l]);
          }
        }
      }
    }
    depthwise_write<kRows, kColumns, L, T>(a, sum, n, p, q, channel);
  }
}

// Any kernel: the sums of L channels of an output pixel.
template <int L, typename T>
__device__ __forceinline__ void depthwise_pixel(const DepthwiseParams& a, int channel, int p, int q) {
  const int top = p * a.stride_h - a.pad_top, left = q * a.stride_w - a.pad_left;
  for (int n = blockIdx.y; n < a.images; n += gridDim.y) {
    const T* in = static_cast<const T*>(a.in) + n * a.in_stride.image + channel * a.in_stride.channel;
    Accumulator<T> sum[1][L] = {};
    for (int r = 0; r < a.kernel_h; ++r) {
      const int h = top + r * a.dilation_h;
      if (unsigned(h) >= unsigned(a.height)) continue;
      for (int s = 0; s < a.kernel_w; ++s) {
        const int w = left + s * a.dilation_w;
        if (unsigned(w) >= unsigned(a.width)) continue;
        const Lanes<T, L> x = load_lanes<L>(in + h * a.in_stride.row + w * a.in_stride.column);
        const Lanes<T, L> y =
            load_lanes<L>(static_cast<const T*>(a.weight) + (int64_t(r) * a.kernel_w + s) * a.channels + channel);
#pragma unroll
        for (int l = 0; l < L; ++l) sum[0][l] += widen(x.at[l]) * widen(y.at[l]);
      }
    }
    depthwise_write<1, 1, L, T>(a, sum, n, p, q, channel);
  }
}

template <int L, typename T>
__device__ __forceinline__ void depthwise_any(const DepthwiseParams& a) {
  TilePlace place;
  if (place.find(a.tiles)) depthwise_pixel<L, T>(a, place.vector * L, place.row_block, place.column_block);
}

// Images with their pixels innermost: threads go along the rows of outputs.
template <typename T>
__device__ __forceinline__ void depthwise_planes(const DepthwiseParams& a) {
  unsigned column, row;
  const unsigned pixel = blockIdx.x * kWindowThreads + threadIdx.x;
  const unsigned channel = a.out_rows.divide(a.out_columns.divide(pixel, column), row);
  if (channel < a.channels) depthwise_pixel<1, T>(a, channel, row, column);
}

#define AI3_DEPTHWISE_KERNEL(name, suffix, ...) \
  AI3_KERNEL_BLOCKS(ai3::kWindowThreads, 3, depthwise_##name##_##suffix, ai3::DepthwiseParams) { ai3::__VA_ARGS__(p); }
#define AI3_DEPTHWISE(suffix, T)                                          \
  AI3_DEPTHWISE_KERNEL(vectors, suffix, depthwise_any<ai3::kLanes<T>, T>) \
  AI3_DEPTHWISE_KERNEL(channels, suffix, depthwise_any<1, T>)             \
  AI3_DEPTHWISE_KERNEL(planes, suffix, depthwise_planes<T>)
// With registers for two blocks the compiler leaves some of stride 2 on the stack before Hopper.
#if __CUDA_ARCH__ >= 900
#define AI3_SQUARE_BLOCKS(S) 2
#else
#define AI3_SQUARE_BLOCKS(S) (3 - S)
#endif
#define AI3_DEPTHWISE_SQUARE(K, S, suffix, T)                                                                    \
  AI3_KERNEL_BLOCKS(ai3::kWindowThreads, AI3_SQUARE_BLOCKS(S), depthwise_##K##x##K##_stride##S##_##suffix,       \
                    ai3::DepthwiseParams) {                                                                      \
    ai3::depthwise_square<K, S, true, T>(p);                                                                     \
  }                                                                                                              \
  AI3_KERNEL_BLOCKS(ai3::kWindowThreads, AI3_SQUARE_BLOCKS(S), depthwise_##K##x##K##_stride##S##_small_##suffix, \
                    ai3::DepthwiseParams) {                                                                      \
    ai3::depthwise_square<K, S, false, T>(p);                                                                    \
  }

#else

inline bool is_depthwise(const ai3_args* a) {
  return a->groups > 1 && a->groups == a->input.size[1] && a->groups == a->output.size[1];
}

inline void depthwise_run(const ai3_args* a) {
  const int64_t *in = a->input.size, *out = a->output.size;
  DepthwiseParams p{};
  p.in = a->input.data, p.weight = a->packed, p.bias = a->bias, p.residual = a->residual.data, p.out = a->output.data;
  p.in_stride = strides_of(a->input), p.out_stride = strides_of(a->output);
  p.images = static_cast<int32_t>(in[0]), p.channels = static_cast<int32_t>(in[1]);
  p.height = static_cast<int32_t>(in[2]), p.width = static_cast<int32_t>(in[3]);
  p.out_height = static_cast<int32_t>(out[2]), p.out_width = static_cast<int32_t>(out[3]);
  p.kernel_h = static_cast<int32_t>(a->kernel_h), p.kernel_w = static_cast<int32_t>(a->kernel_w);
  p.stride_h = static_cast<int32_t>(a->stride_h), p.stride_w = static_cast<int32_t>(a->stride_w);
  p.dilation_h = static_cast<int32_t>(a->dilation_h), p.dilation_w = static_cast<int32_t>(a->dilation_w);
  p.pad_top = static_cast<int32_t>(a->pad_top), p.pad_left = static_cast<int32_t>(a->pad_left);
  p.activation = a->activation;
  p.out_columns = divider(out[3]), p.out_rows = divider(out[2]);
  const auto launch = [&](const std::string& name, cuda::Grid grid, int64_t threads) {
    cuda::launch(a, dtype_name(name.c_str(), a->dtype).c_str(), grid, static_cast<unsigned>(threads), 0, p);
  };
  if (a->input.stride[1] != 1 || a->output.stride[1] != 1) {
    const int64_t threads = in[1] * out[2] * out[3];
    return launch("depthwise_planes", {cuda::ceil_div(threads, kWindowThreads), std::min<int64_t>(in[0], 65535)},
                  kWindowThreads);
  }
  const bool vectors = vector_lanes(a->dtype, a->input) > 1 && vector_lanes(a->dtype, a->output) > 1 &&
                       is_aligned(a->bias) && is_aligned(a->residual.data);
  const bool is_square = vectors && a->dtype != AI3_FLOAT64 && p.kernel_h == p.kernel_w && p.stride_h == p.stride_w &&
                         (p.kernel_h == 3 || p.kernel_h == 5) && p.stride_h <= 2 && p.dilation_h == 1 &&
                         p.dilation_w == 1;
  if (!is_square) {
    p.tiles = make_tiles(in[0], vectors ? in[1] * dtype_bytes(a->dtype) / kVectorBytes : in[1], out[2], out[3]);
    return launch(vectors ? "depthwise_vectors" : "depthwise_channels", tile_grid(p.tiles, in[0]), p.tiles.threads);
  }
  // Large blocks read less, where there are enough of them for the GPU.
  constexpr int64_t kEnoughThreads = 132 * 512;
  const auto set_tiles = [&](auto block) {
    p.tiles = make_tiles(in[0], in[1] / kDepthwiseLanes, cuda::ceil_div(out[2], block.kRows),
                         cuda::ceil_div(out[3], block.kColumns));
    return in[0] * p.tiles.vectors * p.tiles.row_blocks * p.tiles.column_blocks;
  };
  const bool strides = p.stride_h == 2;
  const bool is_large =
      (strides ? set_tiles(DepthwiseBlock<2, true>()) : set_tiles(DepthwiseBlock<1, true>())) >= kEnoughThreads;
  if (!is_large) strides ? set_tiles(DepthwiseBlock<2, false>()) : set_tiles(DepthwiseBlock<1, false>());
  const std::string k = std::to_string(p.kernel_h);
  launch("depthwise_" + k + "x" + k + "_stride" + std::to_string(p.stride_h) + (is_large ? "" : "_small"),
         tile_grid(p.tiles, in[0]), p.tiles.threads);
}

#endif

}  // namespace ai3
