// The transforms between Winograd tiles and channels_last images or packed weights, and the sizes they share. Source:
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv 1509.09308.
#ifndef AI3_WINOGRAD_TILE_H
#define AI3_WINOGRAD_TILE_H

#include <algorithm>

#include "ai3/kernel.h"
#include "ai3/winograd.h"

namespace ai3 {

constexpr int64_t kTileChannels = 64;  // channels transformed at once, so that a tile stays in L1

template <typename T>
constexpr int64_t kPanelColumns = kPanelVectors * kLanes<T>;

struct WinogradShape {
  int64_t tile_height, tile_width, frequencies;
  int64_t channels, filters;  // of one group
  int64_t panels, width;      // of one group; width of all panels, of which the last may be half as wide as the others
  int64_t tile_rows, tile_columns, tiles;
  int64_t block, blocks;  // tiles of a block
  int64_t row, plane;     // strides of V between tiles and frequencies
  int64_t result_plane;   // stride of a panel's products between frequencies
  int64_t v_elements, result_elements, slots;
  int64_t slot_panels;  // of which a slot holds the products at once
  bool share;           // threads share V and split the panels
};

// The image and the first output pixel of a tile.
struct WinogradPlace {
  int64_t image, row, column;
};
inline WinogradPlace place_of(const WinogradShape& s, int64_t tile) {
  const int64_t in_image = tile % (s.tile_rows * s.tile_columns);
  return {tile / (s.tile_rows * s.tile_columns), in_image / s.tile_columns * s.tile_height,
          in_image % s.tile_columns * s.tile_width};
}

// `count` channels of a pixel, with bias, residual and activation.
template <typename T>
inline void finish_pixel(const ai3_args* a, Vec<T> y, const T* bias, int64_t at, int64_t count) {
  using V = Vec<T>;
  if (bias) y += load_part<V>(bias, count);
  if (a->residual.data) y += load_part<V>(static_cast<const T*>(a->residual.data) + at, count);
  store_part(static_cast<T*>(a->output.data) + at, activate(y, a->activation), count);
}

// Tiles of MxM outputs of an RxR kernel.
template <int M, int R = 3>
struct WinogradSquare {
  static constexpr int kOutputs = M;

  static bool fits(const ai3_args* a) { return a->kernel_h == R && a->kernel_w == R; }

  template <typename T>
  static void input(const ai3_args* a, const WinogradShape& s, int64_t group, int64_t tile, T* v) {
    constexpr int size = M + R - 1;
    using V = Vec<T>;
    alignas(64) static constexpr T zeros[kTileChannels] = {};
    // One column more than a tile's, or rows of 8 by 64 floats would fall on the same cache sets.
    alignas(64) T half[size][size + 1][kTileChannels], padded[size][kTileChannels] = {};
    const int64_t plane = s.plane, pixel = a->input.size[1], height = a->input.size[2], width = a->input.size[3];
    const WinogradPlace place = place_of(s, tile);
    const int64_t row = place.row - a->pad_top, column = place.column - a->pad_left;
    const T* image = static_cast<const T*>(a->input.data) + place.image * height * width * pixel + group * s.channels;
    const int64_t top = std::max<int64_t>(0, -row), bottom = std::min<int64_t>(size, height - row);
    for (int64_t first = 0; first < s.channels; first += kTileChannels) {
      const int64_t count = std::min(kTileChannels, s.channels - first);
      for (int64_t j = 0; j < size; ++j) {
        const T* from[size];
        const bool inside = column + j >= 0 && column + j < width;
#pragma GCC unroll 8
        for (int64_t i = 0; i < size; ++i)
          from[i] = inside && i >= top && i < bottom ? image + ((row + i) * width + column + j) * pixel + first : zeros;
        // Whole vectors must not read beyond the last channel.
        if (count % kLanes<T>)
          for (int64_t i = 0; i < size; ++i) from[i] = std::copy(from[i], from[i] + count, padded[i]) - count;
        for (int64_t c = 0; c < count; c += kLanes<T>) {
          V d[size], out[size];
#pragma GCC unroll 8
          for (int i = 0; i < size; ++i) d[i] = load<V>(from[i] + c);
          Winograd<M, R>::template input<T>(d, out);
#pragma GCC unroll 8
          for (int i = 0; i < size; ++i) store(&half[i][j][c], out[i]);
        }
      }
      for (int64_t i = 0; i < size; ++i) {
        T* to = v + i * size * plane + first;
        for (int64_t c = 0; c < count; c += kLanes<T>) {
          V d[size], out[size];
#pragma GCC unroll 8
          for (int j = 0; j < size; ++j) d[j] = load<V>(&half[i][j][c]);
          Winograd<M, R>::template input<T>(d, out);
#pragma GCC unroll 8
          for (int j = 0; j < size; ++j) store(to + j * plane + c, out[j]);
        }
      }
    }
  }

  template <typename T>
  static void output(const ai3_args* a, const WinogradShape& s, int64_t filter, int64_t filters, int64_t width,
                     int64_t tile, const T* results) {
    constexpr int size = M + R - 1;
    using V = Vec<T>;
    constexpr int64_t lanes = kLanes<T>;
    alignas(64) T half[M][size][kPanelColumns<T>];
    const int64_t* out_size = a->output.size;
    const WinogradPlace place = place_of(s, tile);
    const T* bias = a->bias ? static_cast<const T*>(a->bias) + filter : nullptr;
    for (int64_t j = 0; j < size; ++j) {
      const T* from = results + j * s.result_plane;
      for (int64_t c = 0; c < width; c += lanes) {
        V m[size], out[M];
#pragma GCC unroll 8
        for (int i = 0; i < size; ++i) m[i] = load<V>(from + i * size * s.result_plane + c);
        Winograd<M, R>::template output<T>(m, out);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) store(&half[i][j][c], out[i]);
      }
    }
    const int64_t stride = output_pixel_stride(a), rows = std::min<int64_t>(M, out_size[2] - place.row);
    const int64_t columns = std::min<int64_t>(M, out_size[3] - place.column);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t pixel = (place.image * out_size[2] + place.row + i) * out_size[3] + place.column;
      for (int64_t c = 0; c < filters; c += lanes) {
        const int64_t count = std::min(lanes, filters - c);
        V m[size], out[M];
#pragma GCC unroll 8
        for (int j = 0; j < size; ++j) m[j] = load<V>(&half[i][j][c]);
        Winograd<M, R>::template output<T>(m, out);
#pragma GCC unroll 8
        for (int j = 0; j < M; ++j) {
          if (j >= columns) continue;
          finish_pixel<T>(a, out[j], bias ? bias + c : nullptr, (pixel + j) * stride + filter + c, count);
        }
      }
    }
  }

  // G g G^T in double precision, zero for the output channels that fill up the last panel.
  template <typename T>
  static void weights(const ai3_args* a, const WinogradShape& s, T* dst) {
    constexpr int size = M + R - 1;
    constexpr auto& g = Winograd<M, R>::kMatrices.g;
    for (int64_t item = 0; item < a->groups * s.panels; ++item) {
      const int64_t filter = item % s.panels * kPanelColumns<T>, width = std::min(kPanelColumns<T>, s.width - filter);
      const int64_t filters = std::min(width, s.filters - filter), step = s.channels * width;
      const T* weight =
          static_cast<const T*>(a->weight.data) + (item / s.panels * s.filters + filter) * s.channels * R * R;
      for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t k = 0; k < width; ++k) {
          double half[size][R] = {};
          const T* taps = weight + (k * s.channels + c) * R * R;
          for (int i = 0; i < size && k < filters; ++i)
            for (int j = 0; j < R; ++j)
              for (int r = 0; r < R; ++r) half[i][j] += g[i][r] * double(taps[r * R + j]);
          for (int i = 0; i < size; ++i) {
            for (int j = 0; j < size; ++j) {
              double sum = 0;
              for (int r = 0; r < R; ++r) sum += half[i][r] * g[j][r];
              dst[(i * size + j) * step + c * width + k] = T(sum);
            }
          }
        }
      }
      dst += s.frequencies * step;
    }
  }
};

}  // namespace ai3
#endif
