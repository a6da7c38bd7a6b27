// A model of wgmma, by the PTX ISA, for matrices of 128 bytes of depth a row, permuted as the tensor memory accelerator
// does. Each warp does its 16 rows: at once, or as late as its waits allow, where copies are late too.
#include <ai3_emulation/hopper.h>
#include <ai3_emulation/order.h>
#include <ai3_emulation/ptx.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <utility>
#include <vector>

namespace ai3_emulation {

namespace {

// What one instruction multiplies for a warp.
struct Product {
  std::array<ptx::WgmmaLane, 32> lanes;
  ptx::WgmmaType type;
  int columns;
  bool a_in_registers;
};
// The products of a warp that are not done: those of no group yet, and groups. Its threads come to a commit one by
// one, and the first closes the group.
struct Pending {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::array<unsigned, 32> commits{};
  unsigned closed = 0;
};
std::map<unsigned, Pending>& pending() {  // by the warp's number in its cluster
  static auto* const p = new std::map<unsigned, Pending>();
  return *p;
}
Pending& own_pending() { return pending()[current_thread() / 32]; }

}  // namespace

void forget_products() { pending().clear(); }

bool has_products() {
  for (const auto& [warp, own] : pending()) {
    if (!own.open.empty() || !own.groups.empty()) return true;
  }
  return false;
}

}  // namespace ai3_emulation

namespace ai3_emulation::ptx {

namespace {

double element_of(uint32_t address, WgmmaType type) {
  const uint32_t offset = permuted(in_arena(address));
  const void* const at = arena_pointer(offset);
  if (address % 16 == 0) {  // the elements behind the first of 16 bytes are read with it
    check_arena(offset, 16);
    check_landed(offset, 16);
    check_fenced(offset, 16);
    check_order(offset, 16, false);
  }
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

uint32_t row_of(uint64_t matrix, int row) {
  const uint32_t address = uint32_t(matrix & 0x3fff) << 4, eight_rows = uint32_t(matrix >> 32 & 0x3fff) << 4;
  return address + uint32_t(row / 8) * eight_rows + uint32_t(row % 8) * 128;
}

void multiply(const Product& product) {
  const WgmmaLane& first = product.lanes[0];
  const WgmmaType type = product.type;
  const int columns = product.columns, first_row = int(current_warp() % 4) * 16;
  const int element = type == WgmmaType::kTf32 ? 4 : 2, depth = 32 / element, pairs = 4 / element;
  std::vector<double> a(size_t(16 * depth)), b(size_t(columns * depth));
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      if (product.a_in_registers) {
        // A register has one element of 32 bits or a pair of halves: of 16 bytes of depth, rows and the rows on.
        const int half = k * element / 16, in_half = k - half * (depth / 2);
        const uint32_t word = product.lanes[size_t(row % 8 * 4 + in_half / pairs)].a[half * 2 + row / 8];
        float wide;
        if (type == WgmmaType::kTf32) {
          wide = std::bit_cast<float>(word & 0xffffe000u);
        } else if (type == WgmmaType::kFloat16) {
          cvt_f32_f16(wide, half_bits(word >> in_half % 2 * 16));
        } else {
          wide = std::bit_cast<float>((word >> in_half % 2 * 16) << 16);
        }
        a[size_t(row * depth + k)] = wide;
      } else {
        a[size_t(row * depth + k)] = element_of(row_of(first.a_matrix, first_row + row) + uint32_t(k * element), type);
      }
    }
  }
  for (int column = 0; column < columns; ++column) {
    for (int k = 0; k < depth; ++k)
      b[size_t(column * depth + k)] = element_of(row_of(first.b_matrix, column) + uint32_t(k * element), type);
  }
  for (int i = 0; i < 32; ++i) {
    const WgmmaLane& own = product.lanes[size_t(i)];
    for (int j = 0; j < columns / 2; ++j) {
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
  struct Given {
    WgmmaLane* lane;
    WgmmaType type;
    int columns;
    bool a_in_registers;
  } given{&own, type, columns, a_in_registers};
  meet("wgmma", &given, [](void** lanes) {
    const Given& first = *static_cast<Given*>(lanes[0]);
    Product product{{}, first.type, first.columns, first.a_in_registers};
    for (size_t i = 0; i < 32; ++i) product.lanes[i] = *static_cast<Given*>(lanes[i])->lane;
    if (copies_are_early()) return multiply(product);
    own_pending().open.push_back(product);
  });
}

void wgmma_commit_group_sync_aligned() {
  Pending& own = own_pending();
  if (++own.commits[current_thread() % 32] <= own.closed) return;
  ++own.closed;
  own.groups.push_back(std::exchange(own.open, {}));
}

void wgmma_wait_group_sync_aligned(int count) {
  Pending& own = own_pending();
  while (own.groups.size() > size_t(count)) {
    for (const Product& product : own.groups.front()) multiply(product);
    own.groups.pop_front();
  }
}

}  // namespace ai3_emulation::ptx
