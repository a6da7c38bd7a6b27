// The PTX instructions of ptx.h.
// Source: the PTX ISA. Tensor cores multiply exactly and truncate the sum (Ootomo and Yokota, arXiv 2203.03341).
#include <ai3_emulation/ptx.h>
#include <ai3_emulation/runtime.h>

#include <bit>
#include <cmath>

namespace ai3_emulation::ptx {

namespace {

float wide_half(half_bits x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
  if (exponent == 0) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::ldexp(float(fraction), -24)));
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | fraction << 13);
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}
float wide_bfloat16(half_bits x) { return std::bit_cast<float>(uint32_t(x) << 16); }

// To the nearest, ties to even; NaN as the GPU makes it.
half_bits narrow_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return half_bits(sign | 0x7c00);
  if (magnitude < 0x38800000)
    return half_bits(sign | uint32_t(std::nearbyint(std::ldexp(std::bit_cast<float>(magnitude), 24))));
  return half_bits(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}
half_bits narrow_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return half_bits((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void cvt_f32_f16(float& to, half_bits x) { to = wide_half(x); }
void cvt_rn_f16_f32(half_bits& to, float x) { to = narrow_half(x); }
void cvt_rn_bf16_f32(half_bits& to, float x) { to = narrow_bfloat16(x); }
// The first operand is the upper half.
void cvt_rn_f16x2_f32(uint32_t& to, float high, float low) {
  to = uint32_t(narrow_half(high)) << 16 | narrow_half(low);
}
void cvt_rn_bf16x2_f32(uint32_t& to, float high, float low) {
  to = uint32_t(narrow_bfloat16(high)) << 16 | narrow_bfloat16(low);
}

void max_NaN_f32(float& to, float a, float b) {
  to = std::isnan(a) || std::isnan(b) ? std::bit_cast<float>(0x7fffffff) : std::fmax(a, b);
}
void min_NaN_f32(float& to, float a, float b) {
  to = std::isnan(a) || std::isnan(b) ? std::bit_cast<float>(0x7fffffff) : std::fmin(a, b);
}
template <auto kOf, auto kWide, auto kNarrow>
void of_both(uint32_t& to, uint32_t a, uint32_t b) {
  float high, low;
  kOf(high, kWide(half_bits(a >> 16)), kWide(half_bits(b >> 16)));
  kOf(low, kWide(half_bits(a)), kWide(half_bits(b)));
  kNarrow(to, high, low);
}
void max_NaN_f16x2(uint32_t& to, uint32_t a, uint32_t b) {
  of_both<max_NaN_f32, wide_half, cvt_rn_f16x2_f32>(to, a, b);
}
void min_NaN_f16x2(uint32_t& to, uint32_t a, uint32_t b) {
  of_both<min_NaN_f32, wide_half, cvt_rn_f16x2_f32>(to, a, b);
}
void max_NaN_bf16x2(uint32_t& to, uint32_t a, uint32_t b) {
  of_both<max_NaN_f32, wide_bfloat16, cvt_rn_bf16x2_f32>(to, a, b);
}
void min_NaN_bf16x2(uint32_t& to, uint32_t a, uint32_t b) {
  of_both<min_NaN_f32, wide_bfloat16, cvt_rn_bf16x2_f32>(to, a, b);
}
void rcp_approx_f32(float& to, float x) { to = 1 / x; }

void setp_ne_b32(bool& to, uint32_t a, uint32_t b) { to = a != b; }
void mov_b32(uint32_t& to, uint32_t x) { to = x; }
void mov_b16(half_bits& to, half_bits x) { to = x; }
void ld_global_b32(uint32_t& to, const uint32_t* from) {
  check(from, 4, false, true);
  to = *from;
}
void ld_global_b16(half_bits& to, const half_bits* from) {
  check(from, 2, false, true);
  to = *from;
}
void st_shared_v4_b32(uint32_t to, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  uint32_t* const place = static_cast<uint32_t*>(shared_pointer(to));
  check(place, 16, true, true);
  place[0] = x, place[1] = y, place[2] = z, place[3] = w;
}

void cp_async_cg_shared_global(uint32_t to, const void* from, unsigned bytes) { copy_async(to, from, bytes, bytes); }
void cp_async_ca_shared_global(uint32_t to, const void* from, unsigned bytes, unsigned from_bytes) {
  copy_async(to, from, bytes, from_bytes);
}
void cp_async_commit_group() { commit_copies(); }
void cp_async_wait_group(unsigned pending) { wait_copies(pending); }

namespace {

struct MatrixLane {
  const half_bits* row;
  uint32_t result[4];
};

// A lane has two elements of each matrix: neighbours in a row, or, transposed, in a column.
template <bool IsTransposed>
void load_matrices(void** lanes) {
  const auto at = [&](int matrix, int row, int column) -> uint32_t {
    return static_cast<MatrixLane*>(lanes[matrix * 8 + row])->row[column];
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int one = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      static_cast<MatrixLane*>(lanes[lane])->result[i] =
          IsTransposed ? at(i, pair, one) | at(i, pair + 1, one) << 16 : at(i, one, pair) | at(i, one, pair + 1) << 16;
    }
  }
}

MatrixLane matrix_lane(uint32_t address) {
  const MatrixLane own{static_cast<const half_bits*>(shared_pointer(address)), {}};
  check(own.row, 16, false, true);
  return own;
}

}  // namespace

void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3,
                                              uint32_t address) {
  MatrixLane own = matrix_lane(address);
  meet("ldmatrix", &own, load_matrices<false>);
  r0 = own.result[0], r1 = own.result[1], r2 = own.result[2], r3 = own.result[3];
}

void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3,
                                                    uint32_t address) {
  MatrixLane own = matrix_lane(address);
  meet("ldmatrix.trans", &own, load_matrices<true>);
  r0 = own.result[0], r1 = own.result[1], r2 = own.result[2], r3 = own.result[3];
}

namespace {

// Toward zero.
float truncated(double x) {
  const float nearest = static_cast<float>(x);
  return std::abs(static_cast<double>(nearest)) > std::abs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct MmaLane {
  uint32_t a[4], b[2];
  float c[4];
};

// d = a b + c for matrices of 16 x Depth and Depth x 8: of Depth elements a lane has a pair of each 8 (of 32 bits, one
// of each 4).
template <int Depth, typename Element>
void multiply(void** lanes, Element element) {
  constexpr int kPacked = Depth / 8;  // elements of a register
  const auto lane = [&](int i) -> MmaLane& { return *static_cast<MmaLane*>(lanes[i]); };
  double a[16][Depth], b[Depth][8];
  for (int i = 0; i < 32; ++i) {
    for (int e = 0; e < kPacked; ++e) {
      const int depth = i % 4 * kPacked + e;
      for (int half = 0; half < 2; ++half) {
        for (int down = 0; down < 2; ++down)
          a[i / 4 + down * 8][depth + half * (Depth / 2)] = element(lane(i).a[half * 2 + down], e);
        b[depth + half * (Depth / 2)][i / 4] = element(lane(i).b[half], e);
      }
    }
  }
  for (int i = 0; i < 32; ++i) {
    for (int e = 0; e < 4; ++e) {
      const int row = i / 4 + e / 2 * 8, column = i % 4 * 2 + e % 2;
      double sum = lane(i).c[e];
      for (int k = 0; k < Depth; ++k) sum += a[row][k] * b[k][column];
      lane(i).c[e] = truncated(sum);
    }
  }
}

}  // namespace

#define AI3_EMULATED_MMA(name, depth, element)                                                                    \
  void mma_sync_aligned_##name(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, \
                               uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {   \
    MmaLane own{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};                                                    \
    meet("mma." #name, &own, [](void** lanes) {                                                                   \
      multiply<depth>(lanes, [](uint32_t word, int e) { return static_cast<double>(element); });                  \
    });                                                                                                           \
    d0 = own.c[0], d1 = own.c[1], d2 = own.c[2], d3 = own.c[3];                                                   \
  }
AI3_EMULATED_MMA(m16n8k16_row_col_f32_f16_f16_f32, 16, wide_half(half_bits(word >> e * 16)))
AI3_EMULATED_MMA(m16n8k16_row_col_f32_bf16_bf16_f32, 16, wide_bfloat16(half_bits(word >> e * 16)))
AI3_EMULATED_MMA(m16n8k8_row_col_f32_tf32_tf32_f32, 8, std::bit_cast<float>((void(e), word & 0xffffe000u)))
#undef AI3_EMULATED_MMA

}  // namespace ai3_emulation::ptx
