// The transforms between Winograd tiles of a row's or a column's pixels and channels_last images or packed weights.
#ifndef AI3_WINOGRAD_LINE_H
#define AI3_WINOGRAD_LINE_H

#include "ai3/winograd_tile.h"

namespace ai3 {

// Tiles of M outputs of a 1xR kernel, side by side, or of an Rx1 kernel, one above the other.
template <int M, int R>
struct WinogradLine {
  static constexpr int kOutputs = M, kSize = M + R - 1;

  static bool fits(const ai3_args* a) {
    return std::min(a->kernel_h, a->kernel_w) == 1 && a->kernel_h * a->kernel_w == R;
  }

  template <typename T>
  static void input(const ai3_args* a, const WinogradShape& s, int64_t group, int64_t tile, T* v) {
    using V = Vec<T>;
    alignas(64) static constexpr T zeros[kTileChannels] = {};
    alignas(64) T padded[kSize][kTileChannels] = {};
    const int64_t plane = s.plane, pixel = a->input.size[1], height = a->input.size[2], width = a->input.size[3];
    const WinogradPlace place = place_of(s, tile);
    const int64_t row = place.row - a->pad_top, column = place.column - a->pad_left;
    const bool across = a->kernel_w > 1;
    const int64_t begin = across ? column : row, end = across ? width : height, step = across ? pixel : width * pixel;
    const bool inside = across ? row >= 0 && row < height : column >= 0 && column < width;
    const int64_t first_inside = inside ? std::max<int64_t>(0, -begin) : kSize, last_inside = end - begin;
    const int64_t start = ((place.image * height + row) * width + column) * pixel + group * s.channels;
    const T* image = static_cast<const T*>(a->input.data);
    for (int64_t first = 0; first < s.channels; first += kTileChannels) {
      const int64_t count = std::min(kTileChannels, s.channels - first);
      const T* from[kSize];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSize; ++i)
        from[i] = i >= first_inside && i < last_inside ? image + start + i * step + first : zeros;
      // Whole vectors must not read beyond the last channel.
      if (count % kLanes<T>)
        for (int64_t i = 0; i < kSize; ++i) from[i] = std::copy(from[i], from[i] + count, padded[i]) - count;
      for (int64_t c = 0; c < count; c += kLanes<T>) {
        V d[kSize], out[kSize];
#pragma GCC unroll 16
        for (int i = 0; i < kSize; ++i) d[i] = load<V>(from[i] + c);
        Winograd<M, R>::template input<T>(d, out);
#pragma GCC unroll 16
        for (int i = 0; i < kSize; ++i) store(v + i * plane + first + c, out[i]);
      }
    }
  }

  template <typename T>
  static void output(const ai3_args* a, const WinogradShape& s, int64_t filter, int64_t filters, int64_t, int64_t tile,
                     const T* results) {
    using V = Vec<T>;
    constexpr int64_t lanes = kLanes<T>;
    const int64_t* out_size = a->output.size;
    const WinogradPlace place = place_of(s, tile);
    const T* bias = a->bias ? static_cast<const T*>(a->bias) + filter : nullptr;
    const bool across = a->kernel_w > 1;
    const int64_t outputs = std::min<int64_t>(M, across ? out_size[3] - place.column : out_size[2] - place.row);
    const int64_t pixel = (place.image * out_size[2] + place.row) * out_size[3] + place.column;
    const int64_t stride = output_pixel_stride(a), step = across ? stride : stride * out_size[3];
    for (int64_t c = 0; c < filters; c += lanes) {
      const int64_t count = std::min(lanes, filters - c);
      V m[kSize], out[M];
#pragma GCC unroll 16
      for (int i = 0; i < kSize; ++i) m[i] = load<V>(results + i * s.result_plane + c);
      Winograd<M, R>::template output<T>(m, out);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        if (i >= outputs) continue;
        finish_pixel<T>(a, out[i], bias ? bias + c : nullptr, pixel * stride + i * step + filter + c, count);
      }
    }
  }

  // G g in double precision, zero for the output channels that fill up the last panel.
  template <typename T>
  static void weights(const ai3_args* a, const WinogradShape& s, T* dst) {
    constexpr auto& g = Winograd<M, R>::kMatrices.g;
    for (int64_t item = 0; item < a->groups * s.panels; ++item) {
      const int64_t filter = item % s.panels * kPanelColumns<T>, width = std::min(kPanelColumns<T>, s.width - filter);
      const int64_t filters = std::min(width, s.filters - filter), step = s.channels * width;
      const T* weight = static_cast<const T*>(a->weight.data) + (item / s.panels * s.filters + filter) * s.channels * R;
      for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t k = 0; k < width; ++k) {
          for (int i = 0; i < kSize; ++i) {
            double sum = 0;
            for (int r = 0; r < R && k < filters; ++r) sum += g[i][r] * double(weight[(k * s.channels + c) * R + r]);
            dst[i * step + c * width + k] = T(sum);
          }
        }
      }
      dst += kSize * step;
    }
  }
};

}  // namespace ai3
#endif
