// float16 and bfloat16 on a GPU, by the instructions that convert and compare them: no CUDA header is needed, which
// PyTorch's wheels bring only in part.
#pragma once

namespace ai3 {

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

// A type's bits, where they are moved and not computed with.
template <typename T>
struct BitsOf {
  using type = unsigned short;
};
template <>
struct BitsOf<float> {
  using type = unsigned;
};

// What arithmetic on a type is done in.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

// Rounded to the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double narrow<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ Half narrow<Half>(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float x) {
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// The larger, or the smaller, of the elements of two words; a NaN stays one.
template <typename T>
__device__ __forceinline__ uint32_t max_word(uint32_t a, uint32_t b);
template <typename T>
__device__ __forceinline__ uint32_t min_word(uint32_t a, uint32_t b);
#define AI3_OF_WORDS(T, suffix)                                             \
  template <>                                                               \
  __device__ __forceinline__ uint32_t max_word<T>(uint32_t a, uint32_t b) { \
    uint32_t r;                                                             \
    asm("max.NaN." suffix " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));       \
    return r;                                                               \
  }                                                                         \
  template <>                                                               \
  __device__ __forceinline__ uint32_t min_word<T>(uint32_t a, uint32_t b) { \
    uint32_t r;                                                             \
    asm("min.NaN." suffix " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));       \
    return r;                                                               \
  }
AI3_OF_WORDS(Half, "f16x2")
AI3_OF_WORDS(BFloat16, "bf16x2")
#undef AI3_OF_WORDS
__device__ __forceinline__ float at_least(float x, float low) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(low));
  return r;
}
__device__ __forceinline__ float at_most(float x, float high) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(high));
  return r;
}
template <>
__device__ __forceinline__ uint32_t max_word<float>(uint32_t a, uint32_t b) {
  return __float_as_uint(at_least(__uint_as_float(a), __uint_as_float(b)));
}
template <>
__device__ __forceinline__ uint32_t min_word<float>(uint32_t a, uint32_t b) {
  return __float_as_uint(at_most(__uint_as_float(a), __uint_as_float(b)));
}

}  // namespace ai3
