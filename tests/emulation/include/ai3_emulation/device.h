// What CUDA gives device code: keywords, built-in variables and functions. `__shared__` and `asm` are rewritten before
// the compiler sees them (tests/emulation/source.py).
#pragma once

#include <ai3_emulation/runtime.h>
#include <math.h>

#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}

inline void __syncthreads() { ai3_emulation::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { ai3_emulation::warp_barrier(); }
inline size_t __cvta_generic_to_shared(const void* p) { return ai3_emulation::shared_address(p); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  struct Lane {
    T value, result;
    int mask;
  } own{value, {}, mask};
  ai3_emulation::meet("shfl.xor", &own, [](void** lanes) {
    for (int i = 0; i < 32; ++i) {
      Lane& lane = *static_cast<Lane*>(lanes[i]);
      lane.result = static_cast<Lane*>(lanes[i ^ lane.mask])->value;
    }
  });
  return own.result;
}

namespace ai3_emulation {

template <typename T, int Declaration>
T& static_shared(size_t alignment) {
  static const char key = 0;
  return *static_cast<T*>(static_shared(&key, sizeof(T), alignment > alignof(T) ? alignment : alignof(T)));
}

}  // namespace ai3_emulation
