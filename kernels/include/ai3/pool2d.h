// What the pooling algorithms share: the walk over output pixels, and the reduction of a window over vectors of
// channels.
#ifndef AI3_POOL2D_H
#define AI3_POOL2D_H

#include <algorithm>
#include <cassert>

#include "ai3/kernel.h"
#include "ai3/vec.h"

namespace ai3 {

// The input rows (or columns) begin, begin + step, ... below end.
struct Span {
  int64_t begin, end, step;
};

inline const char* pool_supports(const ai3_args* args) {
  return args->dtype == AI3_FLOAT32 || args->dtype == AI3_FLOAT64 ? nullptr : "needs float32 or float64";
}

// Reads the input from memory once and every window from cache.
inline double pool_cost(const ai3_args* args, double window) {
  const int64_t *in = args->input.size, *out = args->output.size;
  const double bytes = args->dtype == AI3_FLOAT64 ? 8 : 4;
  const double outputs = double(out[0]) * double(out[1]) * double(out[2]) * double(out[3]);
  const double inputs = double(in[0]) * double(in[1]) * double(in[2]) * double(in[3]);
  return (inputs + outputs) * bytes / 20 + outputs * window * bytes / 100;
}

template <typename T>
struct Mean {
  static constexpr T identity = 0;
  T divisor;
  template <typename V>
  static V combine(V a, V b) {
    return a + b;
  }
  template <typename V>
  V finish(V total) const {
    return total / divisor;
  }
};

// N vectors (or scalars) V of channels of one window. Rows are reduced first, then their results: the rounding error of
// a mean over a large window stays small.
template <int N, typename V, typename T, typename Reduce>
inline void reduce_window(const T* image, int64_t row_stride, int64_t column_stride, Span rows, Span columns,
                          const Reduce& reduce, T* out) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V total[N];
  for (int i = 0; i < N; ++i) total[i] = broadcast<V>(Reduce::identity);
  for (int64_t h = rows.begin; h < rows.end; h += rows.step) {
    V partial[N];
    for (int i = 0; i < N; ++i) partial[i] = broadcast<V>(Reduce::identity);
    for (int64_t w = columns.begin; w < columns.end; w += columns.step) {
      const T* pixel = image + h * row_stride + w * column_stride;
      for (int i = 0; i < N; ++i) partial[i] = Reduce::combine(partial[i], load<V>(pixel + i * lanes));
    }
    for (int i = 0; i < N; ++i) total[i] = Reduce::combine(total[i], partial[i]);
  }
  for (int i = 0; i < N; ++i) store(out + i * lanes, reduce.finish(total[i]));
}

// Channels are shared out in blocks, so that a mean over whole images has work for every thread.
constexpr int64_t kPoolChannels = 256;
inline int64_t pool_blocks(const ai3_args* args) { return (args->output.size[1] + kPoolChannels - 1) / kPoolChannels; }

// Pool::rows(args, p), Pool::columns(args, q) and Pool::reduce<T>(args, p, q) describe one output pixel. Strides follow
// from the sizes, since those of dimensions of size 1 may be anything.
template <typename T, typename Pool>
void pool_range(void* arg, int64_t begin, int64_t end) {
  const auto* args = static_cast<const ai3_args*>(arg);
  const int64_t* out_size = args->output.size;
  const int64_t channels = out_size[1], out_stride = args->output.stride[3], column_stride = channels,
                row_stride = args->input.size[3] * channels;
  const int64_t blocks = pool_blocks(args);
  constexpr int lanes = kLanes<T>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t line = item / blocks, n = line / out_size[2], p = line % out_size[2];
    const int64_t c_begin = item % blocks * kPoolChannels, c_end = std::min(channels, c_begin + kPoolChannels);
    const T* image = static_cast<const T*>(args->input.data) + n * args->input.size[2] * row_stride;
    T* out = static_cast<T*>(args->output.data) + line * out_size[3] * out_stride;
    const Span rows = Pool::rows(args, p);
    for (int64_t q = 0; q < out_size[3]; ++q, out += out_stride) {
      const Span columns = Pool::columns(args, q);
      const auto reduce = Pool::template reduce<T>(args, p, q);
      int64_t c = c_begin;
      for (; c + 4 * lanes <= c_end; c += 4 * lanes)
        reduce_window<4, Vec<T>>(image + c, row_stride, column_stride, rows, columns, reduce, out + c);
      for (; c + lanes <= c_end; c += lanes)
        reduce_window<1, Vec<T>>(image + c, row_stride, column_stride, rows, columns, reduce, out + c);
      for (; c < c_end; ++c) reduce_window<1, T>(image + c, row_stride, column_stride, rows, columns, reduce, out + c);
    }
  }
}

template <typename Pool>
void pool_run(const ai3_args* args) {
  assert(args->input.ndim == 4 && args->output.ndim == 4 && args->input.data && args->output.data && args->runtime);
  assert(args->input.size[0] == args->output.size[0] && args->input.size[1] == args->output.size[1]);
  assert(args->output.stride[3] >= args->output.size[1] && !pool_supports(args));
  const auto body = args->dtype == AI3_FLOAT64 ? pool_range<double, Pool> : pool_range<float, Pool>;
  const int64_t lines = args->output.size[0] * args->output.size[2];
  args->runtime->parallel_for(lines * pool_blocks(args), body, const_cast<ai3_args*>(args));
}

}  // namespace ai3
#endif
