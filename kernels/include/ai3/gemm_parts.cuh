// 16 bytes of elements, as sums become them: rounded to the type, clamped, added to.
#pragma once

#include <ai3/half.cuh>

namespace ai3 {

template <typename T>
__device__ __forceinline__ uint32_t narrow_pair(float a, float b);
template <>
__device__ __forceinline__ uint32_t narrow_pair<Half>(float a, float b) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
template <>
__device__ __forceinline__ uint32_t narrow_pair<BFloat16>(float a, float b) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}

// 16 bytes of elements.
template <typename T>
struct Part {
  static constexpr int kCount = 16 / sizeof(T);
  uint4 words;
  __device__ __forceinline__ void get(float (&v)[kCount]) const {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        v[i] = __uint_as_float(w[i]);
      } else {
        v[2 * i] = widen(T{static_cast<unsigned short>(w[i] & 0xffff)});
        v[2 * i + 1] = widen(T{static_cast<unsigned short>(w[i] >> 16)});
      }
    }
  }
  __device__ __forceinline__ void add_to(float (&v)[kCount]) const {
    float own[kCount];
    get(own);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += own[i];
  }
  static __device__ __forceinline__ Part of(const float (&v)[kCount]) {
    if constexpr (sizeof(T) == 4) {
      return {{__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])}};
    } else {
      return {{narrow_pair<T>(v[0], v[1]), narrow_pair<T>(v[2], v[3]), narrow_pair<T>(v[4], v[5]),
               narrow_pair<T>(v[6], v[7])}};
    }
  }
  // By bounds that the type holds.
  __device__ __forceinline__ Part clamped(float low, float high) const {
    const auto bound = [](float x) {
      if constexpr (sizeof(T) == 4)
        return __float_as_uint(x);
      else
        return narrow_pair<T>(x, x);
    };
    const uint32_t l = bound(low), h = bound(high);
    const auto within = [l, h](uint32_t word) { return min_word<T>(max_word<T>(word, l), h); };
    return {{within(words.x), within(words.y), within(words.z), within(words.w)}};
  }
};

}  // namespace ai3
