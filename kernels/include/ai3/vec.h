// Vectors of the widest registers the compiler may use, with the compiler's own vector extension: no intrinsics.
// The functions also take scalars in place of vectors (V = float), so that one body serves a loop and its tail.
#ifndef AI3_VEC_H
#define AI3_VEC_H

#include <stdint.h>
#include <string.h>

namespace ai3 {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// Of any alignment.
template <typename V, typename T>
inline V load(const T* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <typename V, typename T>
inline void store(T* to, V value) {
  memcpy(to, &value, sizeof value);
}

// The first `count` lanes (of at most all); the others are zero, and their memory is not touched.
template <typename V, typename T>
inline V load_part(const T* from, int64_t count) {
  if (count * int64_t(sizeof(T)) >= int64_t(sizeof(V))) return load<V>(from);
  V value{};
  memcpy(&value, from, size_t(count) * sizeof(T));
  return value;
}

template <typename V, typename T>
inline void store_part(T* to, V value, int64_t count) {
  if (count * int64_t(sizeof(T)) >= int64_t(sizeof(V))) return store(to, value);
  memcpy(to, &value, size_t(count) * sizeof(T));
}

// Fetches what will be written, `rows` of N vectors: a store that waits for memory holds up all those behind it.
template <int N, typename T>
inline void fetch_to_write(T* to, int64_t rows, int64_t stride) {
  for (int64_t m = 0; m < rows; ++m, to += stride) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) __builtin_prefetch(to + n * kLanes<T>, 1);
  }
}

template <typename V, typename T>
inline V broadcast(T value) {
  return value - V{};
}

// NaN stays NaN, as in PyTorch.
template <typename V>
inline V relu(V value) {
  return value < 0 ? V{} : value;
}

}  // namespace ai3
#endif
