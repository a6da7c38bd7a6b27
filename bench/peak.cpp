// The most this CPU does: independent multiply-adds in registers, and bytes a second of reading and copying memory.
// Compiled as the kernels are, so that a kernel's share is of what its own instructions could reach.
#include <ai3/vec.h>

#include <chrono>
#include <thread>
#include <vector>

namespace {

using V = ai3::Vec<float>;
// Enough to hide the latency of two multiply-adds a cycle, and with the operands no more than there are registers.
constexpr int kChains = ai3::kVectorBytes == 64 ? 24 : 12;

volatile float sink;  // what is computed is used, or the compiler would leave it out
volatile float factor = 1.0000001f, term = 0.9999f;

template <typename Body>
double seconds(int threads, Body body) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back(body, i);
  body(0);
  for (std::thread& thread : team) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

float total(V value) {
  float sum = 0;
  for (int i = 0; i < ai3::kLanes<float>; ++i) sum += value[i];
  return sum;
}

void multiply_add(int64_t rounds) {
  const V x = ai3::broadcast<V>(float(factor)), y = ai3::broadcast<V>(float(term));
  V chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = ai3::broadcast<V>(float(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * x + y;
  }
  V sum{};
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  sink = total(sum);
}

void read(const float* from, int64_t count) {
  constexpr int kSums = 8, kLanes = ai3::kLanes<float>;
  V sums[kSums] = {};
  for (int64_t at = 0; at + kSums * kLanes <= count; at += kSums * kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) sums[i] += ai3::load<V>(from + at + i * kLanes);
  }
  V sum{};
  for (int i = 0; i < kSums; ++i) sum += sums[i];
  sink = total(sum);
}

}  // namespace

extern "C" {

// Operations a second; a multiply-add is two.
__attribute__((visibility("default"))) double bench_multiply_add(int threads, int64_t rounds) {
  const double time = seconds(threads, [=](int) { multiply_add(rounds); });
  return 2.0 * double(rounds) * kChains * ai3::kLanes<float> * threads / time;
}

// Bytes read a second.
__attribute__((visibility("default"))) double bench_read(int threads, const float* from, int64_t count) {
  const int64_t part = count / threads;
  const double time = seconds(threads, [=](int i) { read(from + i * part, part); });
  return double(part * threads * int64_t(sizeof(float))) / time;
}

// Bytes read and written a second.
__attribute__((visibility("default"))) double bench_copy(int threads, float* to, const float* from, int64_t count) {
  const int64_t part = count / threads;
  const double time =
      seconds(threads, [=](int i) { memcpy(to + i * part, from + i * part, size_t(part) * sizeof(float)); });
  return 2.0 * double(part * threads * int64_t(sizeof(float))) / time;
}
}
