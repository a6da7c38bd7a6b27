// The transforms of conv2d/winograd.cu, of weights, of tiles of the image and of tiles of the output, and what a kernel
// of it is given. Source: as there.
#pragma once

#include <ai3/cuda.h>

namespace ai3::winograd {

// Tiles are numbered by images, rows and columns; a launch takes some of them. In blocks of 16 channels, U is
// [frequency][block][width][16] and V is [frequency][block][rows][16]; the products are
// [split][frequency][rows][width].
struct Params {
  const float *input, *weight, *bias, *residual;
  float *output, *u, *v, *products;
  int64_t in_image, in_row, in_pixel, out_image, out_row, out_pixel;
  int channels, filters, height, columns, out_height, out_columns, pad_top, pad_left;
  int tile_rows, tile_columns;  // of an image
  int64_t first_image;
  int first, tiles, rows;  // the first tile, of that image; tiles, and rows of V, which fill up the last block's
  int blocks, width;       // of channels, an even number; filters, filled up to a multiple of 64
  int splits;              // of the channel blocks, whose products the output transform adds up
  int activation;
};

}  // namespace ai3::winograd

#ifdef __CUDACC__

#include <ai3/activation.cuh>
#include <ai3/winograd_products.cuh>
#include <ai3/winograd_transforms.cuh>

namespace ai3::winograd {

struct Place {
  int64_t image;
  int row, column;  // of the first output
};
template <int M>
__device__ __forceinline__ Place place_of(const Params& p, int tile) {
  const unsigned index = p.first + tile, tiles = p.tile_rows * p.tile_columns, columns = p.tile_columns;
  const unsigned in_image = index % tiles;
  return {p.first_image + index / tiles, static_cast<int>(in_image / columns * M),
          static_cast<int>(in_image % columns * M)};
}

template <int M>
__device__ __forceinline__ void transform_weights(const Params& p) {
  using Transform = WinogradTransform<M>;
  constexpr int kSize = Transform::kSize;
  const int64_t elements = static_cast<int64_t>(p.blocks) * p.width * 16;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= elements) return;
  const int channel = static_cast<int>(index / (p.width * 16)) * 16 + channel_of_slot(index % 16);
  const int filter = column_of_row(static_cast<int>(index / 16 % p.width));
  double half[kSize][3] = {};
  if (channel < p.channels && filter < p.filters) {
    const float* g = p.weight + (static_cast<int64_t>(filter) * p.channels + channel) * 9;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      double column[3], u[kSize];
#pragma unroll
      for (int i = 0; i < 3; ++i) column[i] = g[i * 3 + j];
      Transform::weights(column, u);
#pragma unroll
      for (int i = 0; i < kSize; ++i) half[i][j] = u[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    double u[kSize];
    Transform::weights(half[i], u);
#pragma unroll
    for (int j = 0; j < kSize; ++j) p.u[(i * kSize + j) * elements + index] = static_cast<float>(u[j]);
  }
}

// A thread takes a channel of a tile.
template <int M>
__device__ __forceinline__ void transform_input(const Params& p) {
  using Transform = WinogradTransform<M>;
  constexpr int kSize = Transform::kSize;
  const unsigned index = blockIdx.x * blockDim.x + threadIdx.x, channels = p.blocks * 16;
  const int tile = index / channels, channel = index % channels;
  if (tile >= p.tiles) return;
  const Place place = place_of<M>(p, tile);
  const int row = place.row - p.pad_top, column = place.column - p.pad_left;
  const float* from = p.input + place.image * p.in_image + row * p.in_row + column * p.in_pixel + channel;
  float d[kSize][kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const bool inside = static_cast<unsigned>(column + j) < static_cast<unsigned>(p.columns) && channel < p.channels;
    float line[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      line[i] = inside && static_cast<unsigned>(row + i) < static_cast<unsigned>(p.height)
                    ? from[i * p.in_row + j * p.in_pixel]
                    : 0;
    }
    Transform::input(line);
#pragma unroll
    for (int i = 0; i < kSize; ++i) d[i][j] = line[i];
  }
  const int64_t plane = static_cast<int64_t>(p.blocks) * p.rows * 16;
  float* to = p.v + (static_cast<int64_t>(channel / 16) * p.rows + tile) * 16 + channel % 16;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    Transform::input(d[i]);
#pragma unroll
    for (int j = 0; j < kSize; ++j) to[(i * kSize + j) * plane] = d[i][j];
  }
}

// A thread takes a filter of a tile. Most activations are calls, and make a kernel slow to fetch: Simple has but relu.
template <int M, bool Simple>
__device__ __forceinline__ void transform_output(const Params& p) {
  using Transform = WinogradTransform<M>;
  constexpr int kSize = Transform::kSize;
  const unsigned index = blockIdx.x * blockDim.x + threadIdx.x, filters = p.filters;
  const int tile = index / filters, filter = index % filters;
  if (tile >= p.tiles) return;
  const int64_t plane = static_cast<int64_t>(p.rows) * p.width;
  const float* from = p.products + static_cast<int64_t>(tile) * p.width + filter;
  float m[kSize][kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i)
#pragma unroll
    for (int j = 0; j < kSize; ++j) m[i][j] = from[(i * kSize + j) * plane];
  for (int split = 1; split < p.splits; ++split) {
    from += kSize * kSize * plane;
#pragma unroll
    for (int i = 0; i < kSize; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j) m[i][j] += from[(i * kSize + j) * plane];
  }
  float half[M][kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    float line[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) line[i] = m[i][j];
    Transform::output(line);
#pragma unroll
    for (int i = 0; i < M; ++i) half[i][j] = line[i];
  }
  const Place place = place_of<M>(p, tile);
  const int64_t at = place.image * p.out_image + place.row * p.out_row + place.column * p.out_pixel + filter;
  const float bias = p.bias == nullptr ? 0 : p.bias[filter];
#pragma unroll
  for (int i = 0; i < M; ++i) {
    if (place.row + i >= p.out_height) break;
    Transform::output(half[i]);
#pragma unroll
    for (int j = 0; j < M; ++j) {
      if (place.column + j >= p.out_columns) break;
      const int64_t pixel = at + i * p.out_row + j * p.out_pixel;
      const float y = half[i][j] + bias + (p.residual == nullptr ? 0 : p.residual[pixel]);
      p.output[pixel] = Simple ? (p.activation == kRelu && y < 0 ? 0 : y) : activate(y, p.activation);
    }
  }
}

}  // namespace ai3::winograd

#endif
