// The kernels that convolutions alone have: those that apply a batch norm and a ReLU to the rows as they read them, as
// those of gemm_kernels.cuh do where no accelerator brings the rows, and those whose taps share a part of the image.
#pragma once

#include <ai3/gemm_kernels.cuh>
#include <ai3/gemm_resident.cuh>

#if defined(__CUDACC__) && AI3_WGMMA

namespace ai3 {

#define AI3_GEMMS_PROLOGUE(name, math)                      \
  AI3_GEMM_BULK(name, math, 64, 32, 4, 4, _prologue, true)  \
  AI3_GEMM_BULK(name, math, 64, 64, 4, 4, _prologue, true)  \
  AI3_GEMM_BULK(name, math, 64, 128, 4, 3, _prologue, true) \
  AI3_GEMM_BULK(name, math, 128, 64, 8, 2, _prologue, true)
#define AI3_GEMM_HALO(math_name, math, down, right, columns, blocks, tile)                    \
  AI3_KERNEL_BLOCKS(8 * 32 + 32, blocks, gemm_##math_name##_##tile##_halo, ai3::GemmParams) { \
    ai3::implicit_gemm_halo<ai3::Math::math, down, right, columns, 8>(p);                     \
  }
#define AI3_GEMM_RESIDENT(math_name, math, down, right)                                                       \
  AI3_KERNEL_BLOCKS(ai3::kResidentTeams * 128 + 32, 1, gemm_##math_name##_128x64_resident, ai3::GemmParams) { \
    ai3::implicit_gemm_resident<ai3::Math::math, down, right, 64>(p);                                         \
  }
#define AI3_GEMMS_HALO(name, math)                 \
  AI3_GEMM_HALO(name, math, 1, 2, 64, 3, 128x64)   \
  AI3_GEMM_HALO(name, math, 1, 2, 128, 2, 128x128) \
  AI3_GEMM_HALO(name, math, 2, 2, 64, 2, 256x64)   \
  AI3_GEMM_HALO(name, math, 2, 2, 128, 1, 256x128)

#if AI3_HAS_PART(AI3_PART_FLOAT16)
AI3_GEMMS_PROLOGUE(float16, kFloat16)
AI3_GEMMS_HALO(float16, kFloat16)
AI3_GEMM_RESIDENT(float16, kFloat16, 1, 2)
#endif
#if AI3_HAS_PART(AI3_PART_BFLOAT16)
AI3_GEMMS_PROLOGUE(bfloat16, kBFloat16)
AI3_GEMMS_HALO(bfloat16, kBFloat16)
AI3_GEMM_RESIDENT(bfloat16, kBFloat16, 1, 2)
#endif
#if AI3_HAS_PART(AI3_PART_TF32)
AI3_GEMMS_PROLOGUE(tf32, kTf32)
AI3_GEMMS_HALO(tf32, kTf32)
AI3_GEMM_RESIDENT(tf32, kTf32, 2, 1)
#endif
#if AI3_HAS_PART(AI3_PART_FLOAT32)
AI3_GEMM_BULK(float32, kFloat32, 64, 64, 4, 3, _prologue, true)
AI3_GEMM_BULK(float32, kFloat32, 64, 128, 4, 2, _prologue, true)
#endif

}  // namespace ai3

#endif
