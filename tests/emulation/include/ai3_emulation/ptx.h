// The PTX instructions of ai3's device code as functions, named as they are with _ for every other character; operands
// in their order, those of a vector one by one. An instruction that is not here does not compile.
#pragma once

#include <cstdint>

namespace ai3_emulation::ptx {

using half_bits = unsigned short;

void cvt_f32_f16(float& to, half_bits x);
void cvt_rn_f16_f32(half_bits& to, float x);
void cvt_rn_bf16_f32(half_bits& to, float x);
void cvt_rn_f16x2_f32(uint32_t& to, float high, float low);
void cvt_rn_bf16x2_f32(uint32_t& to, float high, float low);
void max_NaN_f32(float& to, float a, float b);
void max_NaN_f16x2(uint32_t& to, uint32_t a, uint32_t b);
void max_NaN_bf16x2(uint32_t& to, uint32_t a, uint32_t b);
void min_NaN_f32(float& to, float a, float b);
void min_NaN_f16x2(uint32_t& to, uint32_t a, uint32_t b);
void min_NaN_bf16x2(uint32_t& to, uint32_t a, uint32_t b);
void rcp_approx_f32(float& to, float x);
void setp_ne_b32(bool& to, uint32_t a, uint32_t b);
void mov_b32(uint32_t& to, uint32_t x);
void mov_b16(half_bits& to, half_bits x);
void ld_global_b32(uint32_t& to, const uint32_t* from);
void ld_global_b16(half_bits& to, const half_bits* from);
void st_shared_v4_b32(uint32_t to, uint32_t x, uint32_t y, uint32_t z, uint32_t w);
void cp_async_cg_shared_global(uint32_t to, const void* from, unsigned bytes);
void cp_async_ca_shared_global(uint32_t to, const void* from, unsigned bytes, unsigned from_bytes);
void cp_async_commit_group();
void cp_async_wait_group(unsigned pending);
void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address);
void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3,
                                                    uint32_t address);

#define AI3_EMULATED_MMA(name)                                                                                    \
  void mma_sync_aligned_##name(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, \
                               uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3);
AI3_EMULATED_MMA(m16n8k16_row_col_f32_f16_f16_f32)
AI3_EMULATED_MMA(m16n8k16_row_col_f32_bf16_bf16_f32)
AI3_EMULATED_MMA(m16n8k8_row_col_f32_tf32_tf32_f32)
#undef AI3_EMULATED_MMA

}  // namespace ai3_emulation::ptx
