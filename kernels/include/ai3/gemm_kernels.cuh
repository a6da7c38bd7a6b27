// The kernels of a matrix product or a convolution, by type and tile; gemm_choice.cuh chooses among them.
#pragma once

#include <ai3/gemm_stream.cuh>

#ifdef __CUDACC__

#include <ai3/gemm_bulk.cuh>
#include <ai3/gemm_copies.cuh>
#include <ai3/gemm_float64.cuh>
#include <ai3/gemm_thin.cuh>

namespace ai3 {

// Writes one 16-byte part of the packed weights (with Math::kFloat32 that of the high and that of the low part).
template <Math M>
__device__ __forceinline__ void pack_gemm(const GemmPackParams& p) {
  constexpr int kBytes = M == Math::kFloat16 || M == Math::kBFloat16 ? 2 : 4, kCount = 16 / kBytes;
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.total) return;
  const int column = int(index / 8 % p.packed_columns), part = int(index % 8) ^ (column & 7);
  const int block = int(index / 8 / p.packed_columns % p.blocks), group = int(index / 8 / p.packed_columns / p.blocks);
  const int in_run = column % (4 * kCount);
  const int output = column - in_run + in_run % 8 / 2 * kCount + in_run / 8 * 2 + in_run % 2;
  uint32_t words[4] = {}, lows[4] = {};
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    int tap, channel;
    if (p.one_tap) {
      const int row = block / p.kernel_w;
      tap = row / p.tap_blocks * p.kernel_w + block % p.kernel_w;
      channel = (row % p.tap_blocks * 8 + part) * kCount + e;
    } else {
      const int depth = (block * 8 + part) * kCount + e;
      tap = depth / p.channels, channel = depth - tap * p.channels;
    }
    if (tap >= p.kernel_h * p.kernel_w || channel >= p.channels || output >= p.columns) continue;
    const int channels = p.channels / p.joined;
    const int64_t of = (int64_t(group) * p.columns + output) * channels + channel % channels;
    const int64_t at = (of * p.kernel_h * p.kernel_w + tap) * p.joined + channel / channels;
    if constexpr (kBytes == 2) {
      words[e / 2] |= uint32_t(static_cast<const unsigned short*>(p.weight)[at]) << (e % 2 * 16);
    } else {
      split_tf32(static_cast<const uint32_t*>(p.weight)[at], words[e], lows[e]);
    }
  }
  uint4* const to = static_cast<uint4*>(p.packed);
  if constexpr (M == Math::kFloat32) {
    const int64_t high =
        (int64_t(group) * p.blocks + block) * 2 * p.packed_columns * 8 + index % (p.packed_columns * 8);
    to[high] = {words[0], words[1], words[2], words[3]};
    to[high + p.packed_columns * 8] = {lows[0], lows[1], lows[2], lows[3]};
  } else {
    to[index] = {words[0], words[1], words[2], words[3]};
  }
}

#define AI3_GEMM_PACK(name, math) \
  AI3_KERNEL(256, gemm_pack_##name, ai3::GemmPackParams) { ai3::pack_gemm<ai3::Math::math>(p); }
#define AI3_GEMM(math_name, math, rows, columns, warps, suffix, gather)                              \
  AI3_KERNEL_BLOCKS(warps * 32, 1, gemm_##math_name##_##rows##x##columns##suffix, ai3::GemmParams) { \
    ai3::implicit_gemm<ai3::Math::math, rows, columns, warps, gather>(p);                            \
  }
#define AI3_GEMM_BULK(math_name, math, rows, columns, warps, blocks, suffix, prologue)                         \
  AI3_KERNEL_BLOCKS(warps * 32 + 32, blocks, gemm_##math_name##_##rows##x##columns##suffix, ai3::GemmParams) { \
    ai3::implicit_gemm_bulk<ai3::Math::math, rows, columns, warps, prologue>(p);                               \
  }
#define AI3_GEMM_STREAM(math_name, math, columns)                                              \
  AI3_KERNEL_BLOCKS(ai3::kStreamTeams * 128 + 32, 1, gemm_##math_name##_64x##columns##_stream, \
                    ai3::GemmStreamParams) {                                                   \
    ai3::implicit_gemm_stream<ai3::Math::math, columns>(p);                                    \
  }
#define AI3_GEMM_THIN(math_name, math)                                                              \
  AI3_KERNEL_BLOCKS(ai3::kThinWarps * 32 + 32, 2, gemm_##math_name##_16x64_thin, ai3::GemmParams) { \
    ai3::implicit_gemm_thin<ai3::Math::math>(p);                                                    \
  }
#define AI3_GEMMS_ANY(name, math)          \
  AI3_GEMM(name, math, 64, 64, 4, , false) \
  AI3_GEMM(name, math, 64, 64, 4, _gather, true)

#if AI3_WGMMA
#define AI3_GEMMS_BULK(name, math)                        \
  AI3_GEMM_BULK(name, math, 64, 32, 4, 5, _bulk, false)   \
  AI3_GEMM_BULK(name, math, 128, 32, 8, 3, _bulk, false)  \
  AI3_GEMM_BULK(name, math, 64, 64, 4, 4, _bulk, false)   \
  AI3_GEMM_BULK(name, math, 64, 128, 4, 3, _bulk, false)  \
  AI3_GEMM_BULK(name, math, 128, 256, 8, 1, _bulk, false) \
  AI3_GEMM_THIN(name, math)                               \
  AI3_GEMM_STREAM(name, math, 64)                         \
  AI3_GEMM_STREAM(name, math, 128)
#define AI3_GEMMS(name, math)                             \
  AI3_GEMMS_BULK(name, math)                              \
  AI3_GEMM_BULK(name, math, 128, 64, 8, 3, _bulk, false)  \
  AI3_GEMM_BULK(name, math, 128, 128, 8, 2, _bulk, false) \
  AI3_GEMM_BULK(name, math, 256, 64, 8, 2, _bulk, false)  \
  AI3_GEMM_BULK(name, math, 256, 128, 8, 1, _bulk, false)
#else
#define AI3_GEMMS(name, math)               \
  AI3_GEMM(name, math, 128, 64, 8, , false) \
  AI3_GEMM(name, math, 128, 128, 8, , false)
#endif

#if AI3_HAS_PART(AI3_PART_FLOAT16)
AI3_GEMMS_ANY(float16, kFloat16)
AI3_GEMMS(float16, kFloat16)
#endif
#if AI3_HAS_PART(AI3_PART_BFLOAT16)
AI3_GEMMS_ANY(bfloat16, kBFloat16)
AI3_GEMMS(bfloat16, kBFloat16)
#endif
#if AI3_HAS_PART(AI3_PART_FLOAT16) || AI3_HAS_PART(AI3_PART_BFLOAT16)
AI3_GEMM_PACK(float16, kFloat16)
#endif
#if AI3_HAS_PART(AI3_PART_TF32)
AI3_GEMMS_ANY(tf32, kTf32)
#if AI3_WGMMA
AI3_GEMMS_BULK(tf32, kTf32)
AI3_GEMM_BULK(tf32, kTf32, 128, 64, 8, 2, _bulk, false)
AI3_GEMM_BULK(tf32, kTf32, 128, 128, 8, 1, _bulk, false)
#else
AI3_GEMMS(tf32, kTf32)
#endif
AI3_GEMM_PACK(tf32, kTf32)
#endif
#if AI3_HAS_PART(AI3_PART_FLOAT32)
AI3_GEMMS_ANY(float32, kFloat32)
#if AI3_WGMMA
AI3_GEMM_BULK(float32, kFloat32, 64, 64, 4, 3, _bulk, false)
AI3_GEMM_BULK(float32, kFloat32, 64, 128, 4, 2, _bulk, false)
AI3_GEMM_BULK(float32, kFloat32, 128, 128, 8, 1, _bulk, false)
#else
AI3_GEMM(float32, kFloat32, 128, 64, 8, , false)
#endif
AI3_GEMM_PACK(float32, kFloat32)
#endif

}  // namespace ai3

#endif
