// The kernels of gemm_kernels.cuh that apply a batch norm and a ReLU to the rows as they read them. The others do where
// no accelerator brings the rows.
#pragma once

#include <ai3/gemm_kernels.cuh>

#if defined(__CUDACC__) && AI3_WGMMA

namespace ai3 {

#define AI3_GEMMS_PROLOGUE(name, math)                      \
  AI3_GEMM_BULK(name, math, 64, 32, 4, 4, _prologue, true)  \
  AI3_GEMM_BULK(name, math, 64, 64, 4, 4, _prologue, true)  \
  AI3_GEMM_BULK(name, math, 64, 128, 4, 3, _prologue, true) \
  AI3_GEMM_BULK(name, math, 128, 64, 8, 2, _prologue, true)
AI3_GEMMS_PROLOGUE(float16, kFloat16)
AI3_GEMMS_PROLOGUE(bfloat16, kBFloat16)
AI3_GEMMS_PROLOGUE(tf32, kTf32)
AI3_GEMM_BULK(float32, kFloat32, 64, 64, 4, 3, _prologue, true)
AI3_GEMM_BULK(float32, kFloat32, 64, 128, 4, 2, _prologue, true)

}  // namespace ai3

#endif
