// GEMM with packed weights; a few rows are dot products with the weight as it lies, which read it once at full speed.
// Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 2008.
#include "ai3/gemm.h"

#include <cassert>

#include "ai3/kernel.h"

namespace {

using ai3::kLanes;
using ai3::Vec;

// Up to this many rows the time is that of reading the weight, and packing it would gain nothing.
constexpr int64_t kThinRows = 4;
// Elements ahead of its use that a row of the weight is fetched: where it comes from memory the hardware's prefetcher
// alone does not keep up.
constexpr int64_t kFetchedAhead = 512;
// Steps of a panel, and input rows and their bytes, that stay in cache while they are used again.
constexpr int64_t kDepth = 1024, kMaxRows = 384, kInputBytes = 1 << 20;

struct Sizes {
  int64_t rows, depth, columns, bytes;
  explicit Sizes(const ai3_args* a)
      : rows(a->input.size[0]),
        depth(a->input.size[1]),
        columns(a->output.size[1]),
        bytes(a->dtype == AI3_FLOAT64 ? 8 : 4) {}
  bool thin() const { return rows <= kThinRows; }
};

const char* supports(const ai3_args* a) {
  return a->dtype == AI3_FLOAT32 || a->dtype == AI3_FLOAT64 ? nullptr : "needs float32 or float64";
}

size_t packed_bytes(const ai3_args* a) {
  const Sizes s(a);
  if (s.thin()) return 0;
  return size_t(s.bytes * (s.bytes == 8 ? ai3::Panels<double>(s.columns).elements(s.depth)
                                        : ai3::Panels<float>(s.columns).elements(s.depth)));
}

template <typename T>
void pack_as(const ai3_args* a, void* dst) {
  const Sizes s(a);
  const T* weight = static_cast<const T*>(a->weight.data);
  ai3::Panels<T>(s.columns).pack(s.depth, s.depth, static_cast<T*>(dst), [&](int64_t k) { return weight + k; });
}

void pack(const ai3_args* a, void* dst) {
  assert(a->weight.data && dst && !supports(a));
  (a->dtype == AI3_FLOAT64 ? pack_as<double> : pack_as<float>)(a, dst);
}

// M rows of the input times N columns of the output.
template <int M, int N, typename T>
void dot_block(const ai3_args* a, const Sizes& s, int64_t row, int64_t column) {
  constexpr int lanes = kLanes<T>;
  const T* x = static_cast<const T*>(a->input.data) + row * s.depth;
  const T* w = static_cast<const T*>(a->weight.data) + column * s.depth;
  Vec<T> total[M][N] = {};
  for (int64_t k = 0; k < s.depth;) {
    Vec<T> sum[M][N] = {};
    const auto step = [&](auto read) {
      Vec<T> y[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) y[m] = read(x + m * s.depth + k);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        if (row == 0) __builtin_prefetch(w + n * s.depth + k + kFetchedAhead, 0, 2);
        const Vec<T> z = read(w + n * s.depth + k);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sum[m][n] += y[m] * z;
      }
    };
    const int64_t end = std::min(s.depth, k + ai3::kSumSteps * lanes);
    for (; k + lanes <= end; k += lanes) step([](const T* p) { return ai3::load<Vec<T>>(p); });
    if (k < end) {
      step([&](const T* p) { return ai3::load_part<Vec<T>>(p, end - k); });
      k = end;
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) total[m][n] += sum[m][n];
    }
  }
  const T *bias = static_cast<const T*>(a->bias), *residual = static_cast<const T*>(a->residual.data);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      const int64_t at = (row + m) * s.columns + column + n;
      T value = bias ? bias[column + n] : T(0);
      for (int i = 0; i < lanes; ++i) value += total[m][n][i];
      if (residual) value += residual[at];
      static_cast<T*>(a->output.data)[at] = ai3::activate(value, a->activation);
    }
  }
}

// Columns are read four at a time, and again from cache for the next two rows.
template <int N, typename T>
void dot_columns(const ai3_args* a, const Sizes& s, int64_t column) {
  int64_t row = 0;
  for (; row + 2 <= s.rows; row += 2) dot_block<2, N, T>(a, s, row, column);
  if (row < s.rows) dot_block<1, N, T>(a, s, row, column);
}

template <typename T>
void dot_range(void* arg, int64_t begin, int64_t end) {
  const auto* a = static_cast<const ai3_args*>(arg);
  const Sizes s(a);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t last = std::min(s.columns, i * 4 + 4);
    if (last - i * 4 == 4) {
      dot_columns<4, T>(a, s, i * 4);
      continue;
    }
    for (int64_t column = i * 4; column < last; ++column) dot_columns<1, T>(a, s, column);
  }
}

template <typename T>
void run_slot(const ai3_args* a, const ai3::WorkSplit& shares, int64_t slot) {
  const Sizes s(a);
  const ai3::Panels<T> panels(s.columns);
  const ai3::WorkSplit::Part part = shares.part(slot, ai3::ceil_div(s.rows, ai3::kBlockRows), panels.count);
  const int64_t row_end = std::min(s.rows, part.unit_end * ai3::kBlockRows);
  const int64_t fit = kInputBytes / (std::min(s.depth, kDepth) * s.bytes) / ai3::kBlockRows * ai3::kBlockRows;
  const int64_t most = std::clamp<int64_t>(fit, ai3::kBlockRows, kMaxRows);
  const T* const residual = static_cast<const T*>(a->residual.data);
  for (int64_t row = part.unit_begin * ai3::kBlockRows; row < row_end; row += most) {
    for (int64_t p = part.panel_begin; p < part.panel_end; ++p) {
      const int64_t column = panels.first(p), at = row * s.columns + column;
      T* const out = static_cast<T*>(a->output.data) + at;
      ai3::Target<T> to{out,
                        s.columns,
                        panels.used(p),
                        a->bias ? static_cast<const T*>(a->bias) + column : nullptr,
                        residual ? residual + at : nullptr,
                        AI3_IDENTITY};
      for (int64_t k = 0; k < s.depth; k += kDepth) {
        const int64_t steps = std::min(kDepth, s.depth - k);
        if (k + steps == s.depth) to.activation = a->activation;
        const ai3::StridedRows<T> rows{static_cast<const T*>(a->input.data) + row * s.depth + k, s.depth, 0};
        ai3::gemm<T>(rows, std::min(most, row_end - row), 1, steps,
                     static_cast<const T*>(a->packed) + column * s.depth + k * panels.width(p), panels.width(p), to);
        to.bias = nullptr;
        to.residual = out;
      }
    }
  }
}

template <typename T>
void run_as(const ai3_args* a) {
  const Sizes s(a);
  if (s.thin()) {
    assert(a->weight.data);
    return a->runtime->parallel_for(ai3::ceil_div(s.columns, 4), dot_range<T>, const_cast<ai3_args*>(a));
  }
  assert(a->packed);
  const ai3::Panels<T> panels(s.columns);
  const double width = double(panels.width(0)), depth = double(s.depth * s.bytes);
  struct Task {
    const ai3_args* args;
    ai3::WorkSplit shares;
  } task{a,
         {ai3::ceil_div(s.rows, ai3::kBlockRows), panels.count, ai3::kBlockRows * width * depth / 4,
          ai3::kBlockRows * depth, width * depth, a->runtime->num_threads}};
  a->runtime->parallel_for(
      task.shares.slots(),
      [](void* arg, int64_t begin, int64_t end) {
        const Task& t = *static_cast<const Task*>(arg);
        for (int64_t slot = begin; slot < end; ++slot) run_slot<T>(t.args, t.shares, slot);
      },
      &task);
}

void run(const ai3_args* a) {
  assert(a->input.data && a->output.data && a->runtime && !supports(a));
  assert(a->input.size[1] == a->weight.size[1] && a->output.size[1] == a->weight.size[0]);
  if (a->dtype == AI3_FLOAT64) return run_as<double>(a);
  run_as<float>(a);
}

double cost(const ai3_args* a) {
  const Sizes s(a);
  const double rows = double(s.rows), depth = double(s.depth), columns = double(s.columns), bytes = double(s.bytes);
  const double multiply = rows > 0 ? 2 * std::max(rows, s.thin() ? 0.0 : 6.0) * depth * columns * bytes / 4 / 90 : 0;
  return multiply + (rows * depth + rows * columns + depth * columns) * bytes / 20;
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "linear",
                           .algorithm = "gemm",
                           .version = 2,
                           .flags = AI3_EPILOGUE,
                           .supports = supports,
                           .cost = cost,
                           .packed_bytes = packed_bytes,
                           .pack = pack,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
