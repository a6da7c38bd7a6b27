// The kernels of gemm_few_rows.cuh and gemm_few_pixels.cuh, and what packs their weights, by the parts that are
// compiled. gemm_few_host.cuh counts on as many of their blocks on a multiprocessor as are given here.
#pragma once

#include <ai3/gemm_few_pixels.cuh>
#include <ai3/gemm_few_rows.cuh>

#ifdef __CUDACC__

namespace ai3 {

#define AI3_FEW(name, math, pixels_blocks)                                                                          \
  AI3_KERNEL_BLOCKS(ai3::kFewThreads, 4, few_rows_##name, ai3::FewParams) { ai3::few_by_rows<ai3::Math::math>(p); } \
  AI3_KERNEL_BLOCKS(ai3::kFewThreads, pixels_blocks, few_pixels_##name, ai3::FewParams) {                           \
    ai3::few_by_pixels<ai3::Math::math>(p);                                                                         \
  }
#if AI3_HAS_PART(AI3_PART_FLOAT16)
AI3_FEW(float16, kFloat16, 4)
#endif
#if AI3_HAS_PART(AI3_PART_BFLOAT16)
AI3_FEW(bfloat16, kBFloat16, 4)
#endif
#if AI3_HAS_PART(AI3_PART_TF32)
AI3_FEW(tf32, kTf32, 3)
#endif
#undef AI3_FEW

#if AI3_HAS_PART(AI3_PART_FLOAT16) || AI3_HAS_PART(AI3_PART_BFLOAT16)
AI3_KERNEL(256, few_pack_float16, ai3::FewPackParams) { ai3::pack_few<unsigned short>(p); }
#endif
#if AI3_HAS_PART(AI3_PART_TF32)
AI3_KERNEL(256, few_pack_tf32, ai3::FewPackParams) { ai3::pack_few<uint32_t>(p); }
#endif

}  // namespace ai3

#endif
