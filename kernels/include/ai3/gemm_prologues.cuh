// The kernels of gemm_kernels.cuh that apply a batch norm and a ReLU to the rows as they read them. The others do where
// no accelerator brings the rows.
#pragma once

#include <ai3/gemm_kernels.cuh>

#if defined(__CUDACC__) && AI3_WGMMA

namespace ai3 {

AI3_GEMMS_LOW(float16, kFloat16, _prologue, true)
AI3_GEMMS_LOW(bfloat16, kBFloat16, _prologue, true)
AI3_GEMMS_LOW(tf32, kTf32, _prologue, true)
AI3_GEMM_BULK(float32, kFloat32, 64, 64, 4, 3, _prologue, true)
AI3_GEMM_BULK(float32, kFloat32, 64, 128, 4, 2, _prologue, true)

}  // namespace ai3

#endif
