// What the pooling algorithms share: the walk over output pixels, and the reduction of a window over vectors of
// channels.
#ifndef AI3_POOL2D_H
#define AI3_POOL2D_H

#include <algorithm>
#include <cassert>

#include "ai3/window.h"

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

// Parts of the channels, so that a mean over whole images has work for every thread. Each has two vectors at least, as
// the last one may begin inside the one ahead of it.
inline int64_t pool_parts(const ai3_args* args, int64_t vectors) {
  const int64_t lines = args->output.size[0] * args->output.size[2], threads = args->runtime->num_threads;
  return lines >= 2 * threads ? 1 : std::max<int64_t>(1, std::min(threads, vectors / 2));
}

// One row of output pixels and some of its channels, in vectors from vector_begin to vector_end.
struct PoolRow {
  const ai3_args* args;
  int64_t image, p, channels, vector_begin, vector_end;
  int64_t out_stride() const { return args->output.stride[3]; }
  int64_t out(int64_t q) const {
    return ((image * args->output.size[2] + p) * args->output.size[3] + q) * out_stride();
  }
};

// Windows of K x K whose rows all lie inside the image: columns are reduced first, for all the windows they are in.
template <int K, int S, typename Pool, typename V, typename T>
static void pool_square(const PoolRow& row, const T* image, int64_t top) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  using Reduce = decltype(Pool::template reduce<T>(row.args, 0, 0));
  const int64_t width = row.args->input.size[3], row_stride = width * row.channels, out_stride = row.out_stride();
  for_blocks<true>(row.args, [&](auto clip, int64_t q, int64_t) {
    const int64_t left = q * S - row.args->pad_left;
    Reduce reduce[kWindowPixels];
    for (int i = 0; i < kWindowPixels; ++i) reduce[i] = Pool::template reduce<T>(row.args, row.p, q + i);
    T* out = static_cast<T*>(row.args->output.data) + row.out(q);
    for (int64_t v = row.vector_begin; v < row.vector_end; ++v) {
      const int64_t c = std::min(v * lanes, row.channels - lanes);
      const WindowRow<T> in{image + (top * width + left) * row.channels + c, row.channels, -left, width - left};
      V total[kWindowPixels];
#pragma GCC unroll 8
      for (int i = 0; i < kWindowPixels; ++i) total[i] = broadcast<V>(Reduce::identity);
      const auto column = [&](const T* at) __attribute__((always_inline)) {
        V x = load<V>(at);
#pragma GCC unroll 8
        for (int r = 1; r < K; ++r) x = Reduce::combine(x, load<V>(at + r * row_stride));
        return x;
      };
      slide<K, S, decltype(clip)::value>(in, column, [&](int i, V x, int tap) __attribute__((always_inline)) {
        total[i] = tap == 0 ? x : Reduce::combine(total[i], x);
      });
#pragma GCC unroll 8
      for (int i = 0; i < kWindowPixels; ++i) store(out + i * out_stride + c, reduce[i].finish(total[i]));
    }
  });
}

template <typename Pool, typename V, typename T>
static void pool_any(const PoolRow& row, const T* image) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  const int64_t column_stride = row.channels, row_stride = row.args->input.size[3] * row.channels;
  const Span rows = Pool::rows(row.args, row.p);
  for (int64_t q = 0; q < row.args->output.size[3]; ++q) {
    const Span columns = Pool::columns(row.args, q);
    const auto reduce = Pool::template reduce<T>(row.args, row.p, q);
    T* out = static_cast<T*>(row.args->output.data) + row.out(q);
    int64_t v = row.vector_begin;
    for (; v + 4 <= row.vector_end && (v + 4) * lanes <= row.channels; v += 4)
      reduce_window<4, V>(image + v * lanes, row_stride, column_stride, rows, columns, reduce, out + v * lanes);
    for (; v < row.vector_end; ++v) {
      const int64_t c = std::min(v * lanes, row.channels - lanes);
      reduce_window<1, V>(image + c, row_stride, column_stride, rows, columns, reduce, out + c);
    }
  }
}

// Pool::rows(args, p), Pool::columns(args, q) and Pool::reduce<T>(args, p, q) describe one output pixel. Strides follow
// from the sizes, since those of dimensions of size 1 may be anything. K and S: the windows' size and stride, or 0.
template <int K, int S, typename Pool, typename V, typename T>
void pool_range(void* arg, int64_t begin, int64_t end) {
  const auto* args = static_cast<const ai3_args*>(arg);
  const int64_t channels = args->input.size[1], height = args->input.size[2], lanes = sizeof(V) / sizeof(T);
  const int64_t vectors = (channels + lanes - 1) / lanes, parts = pool_parts(args, vectors);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t line = item / parts, part = item % parts, n = line / args->output.size[2];
    const PoolRow row{
        args, n, line % args->output.size[2], channels, vectors * part / parts, vectors * (part + 1) / parts};
    const T* image = static_cast<const T*>(args->input.data) + n * height * args->input.size[3] * channels;
    if constexpr (K) {
      const int64_t top = row.p * S - args->pad_top;
      if (top >= 0 && top + K <= height) {
        pool_square<K, S, Pool, V, T>(row, image, top);
        continue;
      }
    }
    pool_any<Pool, V, T>(row, image);
  }
}

template <typename Pool, typename T>
void pool_run_as(const ai3_args* args) {
  constexpr int64_t kSplitBytes = 256 * 1024;  // below, the threads' start costs more than it saves
  const int64_t *in = args->input.size, *out = args->output.size;
  const auto go = [&](auto lane, ai3_range_fn body) {
    const int64_t lanes = sizeof(lane) / sizeof(T),
                  items = out[0] * out[2] * pool_parts(args, (in[1] + lanes - 1) / lanes);
    if ((in[2] * in[3] + out[2] * out[3]) * in[0] * in[1] * int64_t(sizeof(T)) < kSplitBytes)
      return body(const_cast<ai3_args*>(args), 0, items);
    args->runtime->parallel_for(items, body, const_cast<ai3_args*>(args));
  };
  if (Pool::kWindows && in[1] >= kLanes<T> && slides(args) && args->dilation_h == 1 &&
      args->kernel_h == args->kernel_w && args->stride_h == args->stride_w) {
    const int64_t kind = args->kernel_w * 10 + args->stride_w;
    if (kind == 22) return go(Vec<T>(), pool_range<2, 2, Pool, Vec<T>, T>);
    if (kind == 31) return go(Vec<T>(), pool_range<3, 1, Pool, Vec<T>, T>);
    if (kind == 32) return go(Vec<T>(), pool_range<3, 2, Pool, Vec<T>, T>);
  }
  with_channels<T>(in[1], [&](auto lane) { go(lane, pool_range<0, 0, Pool, decltype(lane), T>); });
}

template <typename Pool>
void pool_run(const ai3_args* args) {
  assert(args->input.ndim == 4 && args->output.ndim == 4 && args->input.data && args->output.data && args->runtime);
  assert(args->input.size[0] == args->output.size[0] && args->input.size[1] == args->output.size[1]);
  assert(args->output.stride[3] >= args->output.size[1] && !pool_supports(args));
  if (args->dtype == AI3_FLOAT64) return pool_run_as<Pool, double>(args);
  pool_run_as<Pool, float>(args);
}

}  // namespace ai3
#endif
