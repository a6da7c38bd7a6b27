// Attention a block of query rows at a time: its scores, their softmax and the weighted values stay in cache.
// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention"
// (2022).
#include <cassert>
#include <cmath>
#include <utility>

#include "ai3/gemm.h"
#include "ai3/kernel.h"
#include "ai3/transpose.h"

namespace {

using ai3::kLanes;
using ai3::Vec;

// Keys whose scores are worked on at once, and the bytes that the scores of a block of rows may take.
constexpr int64_t kKeys = 512, kScoreBytes = 24 << 10;
// Below this, e^x is taken for 0: it is 1e-38 of the largest weight, and the sum of the weights is at least 1.
constexpr float kSmallest = -86;

struct Sizes {
  int64_t heads = 1, rows, keys, depth, width;  // heads: all leading dimensions together
  explicit Sizes(const ai3_args* a)
      : rows(a->output.size[a->output.ndim - 2]),
        keys(a->key.size[a->key.ndim - 2]),
        depth(a->input.size[a->input.ndim - 1]),
        width(a->output.size[a->output.ndim - 1]) {
    for (int d = 0; d < a->output.ndim - 2; ++d) heads *= a->output.size[d];
  }
};

template <typename T>
int64_t padded(int64_t elements) {
  return ai3::ceil_div(elements, kLanes<T>) * kLanes<T>;
}

// How the work is shared and what a thread needs for it.
template <typename T>
struct Plan {
  Sizes s;
  int64_t parts, tasks, slots;        // parts: of a head's rows; slots: threads at most
  int64_t block_keys, stride, block;  // keys a block, elements between rows of scores, rows a block
  int64_t keys_at, values_at, scores_at, maxima_at, sums_at, elements;  // in a slot's share of the workspace

  Plan(const ai3_args* a, int64_t threads) : s(a) {
    // A head is shared out only where there are few of them, as each part packs the head's keys and values again.
    parts = std::clamp<int64_t>(ai3::ceil_div(4 * threads, s.heads + 1), 1, ai3::ceil_div(s.rows, 48));
    if (threads == 1 || s.heads % threads == 0) parts = 1;
    tasks = s.heads * parts;
    slots = std::min(tasks, threads);
    block_keys = std::min(s.keys, kKeys);
    stride = padded<T>(block_keys);
    const int64_t most = kScoreBytes / (stride * int64_t(sizeof(T))) / ai3::kBlockRows * ai3::kBlockRows;
    const int64_t part_rows = ai3::ceil_div(s.rows, parts);
    const int64_t limit = std::max<int64_t>(most, ai3::kBlockRows);
    block = ai3::ceil_div(part_rows, ai3::ceil_div(part_rows, limit));  // blocks of like size
    int64_t at = 0;
    const auto take = [&at](int64_t count) { return std::exchange(at, at + (count + 15) / 16 * 16); };
    keys_at = take(padded<T>(s.keys) * s.depth);
    values_at = take(padded<T>(s.width) * s.keys);
    scores_at = take(block * stride);
    maxima_at = take(block);
    sums_at = take(block);
    elements = at;
  }
};

const char* supports(const ai3_args* a) {
  if (a->dtype != AI3_FLOAT32 && a->dtype != AI3_FLOAT64) return "needs float32 or float64";
  const Sizes s(a);
  return s.keys > 0 && s.depth > 0 ? nullptr : "needs at least one key of one feature";
}

size_t workspace_bytes(const ai3_args* a) {
  const int64_t threads = a->runtime->num_threads;
  if (a->dtype == AI3_FLOAT64) return size_t(Plan<double>(a, threads).elements * threads) * sizeof(double);
  return size_t(Plan<float>(a, threads).elements * threads) * sizeof(float);
}

// A tensor's matrix of one head.
template <typename T>
struct Matrix {
  T* data;               // null for an absent tensor
  int64_t stride, size;  // of rows

  Matrix(const ai3_tensor& t, int64_t head) : data(static_cast<T*>(t.data)), stride(0), size(0) {
    if (t.ndim == 0) return;
    stride = t.stride[t.ndim - 2], size = t.size[t.ndim - 2];
    for (int d = t.ndim - 3; d >= 0; --d) {
      data += head % t.size[d] * t.stride[d];
      head /= t.size[d];
    }
  }
  T* row(int64_t i) const { return data + i * stride; }
};

template <typename T>
struct Task {
  const Plan<T>& plan;
  const ai3_args* args;
  Matrix<T> queries, keys, values, out, bias, mask;
  T *packed_keys, *packed_values, *scores, *maxima, *sums;

  Task(const Plan<T>& p, const ai3_args* a, int64_t head, T* own)
      : plan(p),
        args(a),
        queries(a->input, head),
        keys(a->key, head),
        values(a->value, head),
        out(a->output, head),
        bias(a->score_bias, head),
        mask(a->score_mask, head),
        packed_keys(own + p.keys_at),
        packed_values(own + p.values_at),
        scores(own + p.scores_at),
        maxima(own + p.maxima_at),
        sums(own + p.sums_at) {}

  // Transposed keys and values as the panels of matrix products, a block of keys after the other.
  void pack() const {
    const Sizes& s = plan.s;
    for (int64_t first = 0; first < s.keys; first += kKeys) {
      const int64_t count = std::min(kKeys, s.keys - first);
      const ai3::Panels<T> columns(count), wide(s.width);
      for (int64_t p = 0; p < columns.count; ++p) {
        T* const to = packed_keys + first * s.depth + columns.first(p) * s.depth;
        const int64_t used = columns.used(p), width = columns.width(p);
        ai3::transpose(keys.row(first + columns.first(p)), keys.stride, used, s.depth, to, width);
        for (int64_t e = 0; used < width && e < s.depth; ++e) {
          std::fill(to + e * width + used, to + (e + 1) * width, T(0));
        }
      }
      wide.pack(count, 1, packed_values + first * padded<T>(s.width), [&](int64_t k) { return values.row(first + k); });
    }
  }

  // Rows [begin, end), in blocks.
  void run(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; row += plan.block) {
      const int64_t count = std::min(plan.block, end - row);
      const int64_t keys_seen = args->is_causal ? std::min(plan.s.keys, row + count) : plan.s.keys;
      for (int64_t first = 0; first < keys_seen; first += kKeys) attend(row, count, first);
      for (int64_t i = 0; i < count; ++i) scale(out.row(row + i), inverse(i));
    }
  }

  // What a block of keys adds to a block of rows: before, `out` holds the sums over earlier keys.
  void attend(int64_t row, int64_t count, int64_t first) const {
    const Sizes& s = plan.s;
    const int64_t block = std::min(kKeys, s.keys - first);
    const ai3::Panels<T> columns(block), wide(s.width);
    const ai3::StridedRows<T> q{queries.row(row), queries.stride, 0}, weights{scores, plan.stride, 0};
    for (int64_t p = 0; p < columns.count; ++p) {
      const int64_t at = columns.first(p);
      ai3::gemm<T>(q, count, 1, s.depth, packed_keys + (first + at) * s.depth, columns.width(p),
                   {scores + at, plan.stride, columns.width(p), nullptr, nullptr, AI3_IDENTITY});
    }
    for (int64_t i = 0; i < count; ++i) {
      const T kept = softmax(row + i, i, first, block);
      if (first > 0) scale(out.row(row + i), kept);
    }
    for (int64_t p = 0; p < wide.count; ++p) {
      const int64_t at = wide.first(p);
      T* const to = out.row(row) + at;
      ai3::gemm<T>(weights, count, 1, block, packed_values + first * padded<T>(s.width) + at * block, wide.width(p),
                   {to, out.stride, wide.used(p), nullptr, first > 0 ? to : nullptr, AI3_IDENTITY});
    }
  }

  // Turns row i of the scores into weights relative to the largest score so far, and adds their sum to the row's.
  // Returns what is left of the weight of earlier keys.
  T softmax(int64_t row, int64_t i, int64_t first, int64_t block) const {
    using V = Vec<T>;
    constexpr T kMasked = -INFINITY;
    T* const at = scores + i * plan.stride;
    const int64_t columns = args->is_causal ? std::clamp<int64_t>(row + 1 - first, 0, block) : block;
    const T factor = T(args->scale);
    V numbers, most = ai3::broadcast<V>(kMasked);
    const V masked = most;
    for (int lane = 0; lane < kLanes<T>; ++lane) numbers[lane] = T(lane);
    for (int64_t n = 0; n < block; n += kLanes<T>) {
      V x = ai3::load<V>(at + n) * factor;
      if (bias.data) x += read(bias, row, first + n);
      if (mask.data) x += read(mask, row, first + n);
      if (n + kLanes<T> > columns) x = numbers < T(columns - n) ? x : masked;
      ai3::store(at + n, x);
      most = x > most ? x : most;
    }
    const T before = first > 0 ? maxima[i] : kMasked;
    T largest = ai3::join_lanes<T>(most, [](V a, V b) { return a > b ? a : b; });
    largest = largest > before ? largest : before;
    // Without a finite score yet, the row keeps -inf for its maximum; NaN where only the scores are NaN.
    const T shift = largest == kMasked ? T(0) : largest;
    V sum{};
    for (int64_t n = 0; n < block; n += kLanes<T>) {
      const V x = ai3::load<V>(at + n) - shift, power = ai3::exponential(x);
      const V weight = x < T(kSmallest) ? V{} : power;
      ai3::store(at + n, weight);
      sum += weight;
    }
    const T kept = before == kMasked ? T(0) : std::exp(before - shift);
    sums[i] = (first > 0 ? sums[i] * kept : T(0)) + ai3::join_lanes<T>(sum, [](V a, V b) { return a + b; });
    maxima[i] = largest;
    return kept;
  }

  // A vector of a row of the bias or the mask; behind the row's end come whatever numbers lie there in the tensor.
  Vec<T> read(const Matrix<T>& from, int64_t row, int64_t column) const {
    const T* const at = from.row(row) + column;
    const int64_t left = plan.s.keys - column;
    // The last vector of a row may read into the next one, which the tensor has unless this is its last.
    const bool whole = left >= kLanes<T> || (from.stride >= kLanes<T> - left && row + 1 < from.size);
    return whole ? ai3::load<Vec<T>>(at) : ai3::load_part<Vec<T>>(at, left);
  }

  T inverse(int64_t i) const {
    if (maxima[i] == T(-INFINITY) && sums[i] == 0) return args->masked_is_zero ? T(0) : T(NAN);
    return T(1) / sums[i];
  }

  void scale(T* row, T by) const {
    for (int64_t n = 0; n < plan.s.width; n += kLanes<T>) {
      const int64_t left = plan.s.width - n;
      ai3::store_part(row + n, ai3::load_part<Vec<T>>(row + n, left) * by, left);
    }
  }
};

template <typename T>
void run_as(const ai3_args* a) {
  const Plan<T> plan(a, a->runtime->num_threads);
  struct Job {
    const ai3_args* args;
    const Plan<T>& plan;
  } job{a, plan};
  a->runtime->parallel_for(
      plan.slots,
      [](void* arg, int64_t begin, int64_t end) {
        const Job& job = *static_cast<const Job*>(arg);
        const Plan<T>& plan = job.plan;
        for (int64_t slot = begin; slot < end; ++slot) {
          T* const own = static_cast<T*>(job.args->workspace) + slot * plan.elements;
          int64_t packed = -1;
          for (int64_t i = plan.tasks * slot / plan.slots; i < plan.tasks * (slot + 1) / plan.slots; ++i) {
            const int64_t head = i / plan.parts, part = i % plan.parts;
            const Task<T> task(plan, job.args, head, own);
            if (head != packed) task.pack();
            packed = head;
            task.run(plan.s.rows * part / plan.parts, plan.s.rows * (part + 1) / plan.parts);
          }
        }
      },
      &job);
}

void run(const ai3_args* a) {
  assert(a->input.data && a->key.data && a->value.data && a->output.data && a->runtime && !supports(a));
  for (const ai3_tensor* t : {&a->input, &a->key, &a->value, &a->output, &a->score_bias, &a->score_mask}) {
    assert(t->ndim == 0 || (t->ndim == a->output.ndim && (t->stride[t->ndim - 1] == 1 || t->size[t->ndim - 1] == 1)));
  }
  if (a->dtype == AI3_FLOAT64) return run_as<double>(a);
  run_as<float>(a);
}

double cost(const ai3_args* a) {
  const Sizes s(a);
  const double bytes = a->dtype == AI3_FLOAT64 ? 8 : 4, heads = double(s.heads), scores = double(s.rows * s.keys);
  const double elements = double((s.rows + s.keys) * (s.depth + s.width));
  return heads * (scores * (2 * double(s.depth + s.width) / 80 + 0.25) * bytes / 4 + elements * bytes / 20);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "attention",
                           .algorithm = "direct",
                           .version = 1,
                           .supports = supports,
                           .cost = cost,
                           .workspace_bytes = workspace_bytes,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
