// A model of wgmma, by the PTX ISA, for matrices of 128 bytes of depth a row, permuted as the tensor memory accelerator
// does. Products are done at once, by each warp its 16 rows.
#include <ai3_emulation/hopper.h>
#include <ai3_emulation/ptx.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

namespace ai3_emulation::ptx {

namespace {

double element_of(uint32_t address, WgmmaType type) {
  const uint32_t offset = permuted(in_arena(address));
  const void* const at = arena_pointer(offset);
  check_arena(offset, 2);
  check_landed(offset & ~15u, 16);
  if (type == WgmmaType::kTf32) {
    uint32_t word;
    std::memcpy(&word, at, 4);
    return std::bit_cast<float>(word & 0xffffe000u);
  }
  half_bits half;
  std::memcpy(&half, at, 2);
  float wide;
  if (type == WgmmaType::kFloat16) {
    cvt_f32_f16(wide, half);
  } else {
    wide = std::bit_cast<float>(uint32_t(half) << 16);
  }
  return wide;
}

struct Wide {
  WgmmaLane* lane;
  WgmmaType type;
  int columns;
  bool a_in_registers;
  unsigned warp;
};

uint32_t row_of(uint64_t matrix, int row) {
  const uint32_t address = uint32_t(matrix & 0x3fff) << 4, eight_rows = uint32_t(matrix >> 32 & 0x3fff) << 4;
  return address + uint32_t(row / 8) * eight_rows + uint32_t(row % 8) * 128;
}

void multiply(void** lanes) {
  const Wide& first = *static_cast<Wide*>(lanes[0]);
  const int element = first.type == WgmmaType::kTf32 ? 4 : 2, depth = 32 / element, pairs = 4 / element;
  std::vector<double> a(size_t(16 * depth)), b(size_t(first.columns * depth));
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      if (first.a_in_registers) {
        // A register has one element of 32 bits or a pair of halves: of 16 bytes of depth, rows and the rows on.
        const int half = k * element / 16, in_half = k - half * (depth / 2);
        const Wide& from = *static_cast<Wide*>(lanes[row % 8 * 4 + in_half / pairs]);
        const uint32_t word = from.lane->a[half * 2 + row / 8];
        float wide;
        if (first.type == WgmmaType::kTf32) {
          wide = std::bit_cast<float>(word & 0xffffe000u);
        } else if (first.type == WgmmaType::kFloat16) {
          cvt_f32_f16(wide, half_bits(word >> in_half % 2 * 16));
        } else {
          wide = std::bit_cast<float>((word >> in_half % 2 * 16) << 16);
        }
        a[size_t(row * depth + k)] = wide;
      } else {
        a[size_t(row * depth + k)] = element_of(
            row_of(first.lane->a_matrix, int(first.warp % 4) * 16 + row) + uint32_t(k * element), first.type);
      }
    }
  }
  for (int column = 0; column < first.columns; ++column) {
    for (int k = 0; k < depth; ++k)
      b[size_t(column * depth + k)] =
          element_of(row_of(first.lane->b_matrix, column) + uint32_t(k * element), first.type);
  }
  for (int i = 0; i < 32; ++i) {
    const WgmmaLane& own = *static_cast<Wide*>(lanes[i])->lane;
    for (int j = 0; j < first.columns / 2; ++j) {
      const int row = i / 4 + j % 4 / 2 * 8, column = j / 4 * 8 + i % 4 * 2 + j % 2;
      double sum = own.accumulates ? double(*own.sums[j]) : 0.0;
      for (int k = 0; k < depth; ++k) sum += a[size_t(row * depth + k)] * b[size_t(column * depth + k)];
      const float nearest = float(sum);
      *own.sums[j] = std::abs(double(nearest)) > std::abs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
    }
  }
}

}  // namespace

void wgmma(WgmmaLane& own, WgmmaType type, int columns, bool a_in_registers) {
  Wide wide{&own, type, columns, a_in_registers, current_warp()};
  meet("wgmma", &wide, multiply);
}

}  // namespace ai3_emulation::ptx
