// The PTX instructions of sm_90a that ai3's device code has, as those of ptx.h: barriers in shared memory, bulk copies
// and the tensor memory accelerator, products of a warpgroup, and clusters.
#pragma once

#include <ai3_emulation/runtime.h>

#include <utility>

namespace ai3_emulation {

// Where the permutation by 128 bytes has 16 bytes: by the address in units of 128 bytes modulo 8.
inline uint32_t permuted(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// That no thread wrote shared memory without a fence since, which wgmma or the tensor memory accelerator reads.
void check_fenced(size_t begin, size_t bytes);

// Of wgmma.cpp, at the beginning and the end of a cluster.
void forget_products();
bool has_products();

}  // namespace ai3_emulation

namespace ai3_emulation::ptx {

void griddepcontrol_wait();
void bar_sync(int barrier, int threads);
void fence_proxy_async_shared_cta();
void fence_mbarrier_init_release_cluster();
void mbarrier_init_shared_cta_b64(uint32_t barrier, int arrivals);
void mbarrier_arrive_shared_cta_b64(uint32_t barrier);
void mbarrier_arrive_expect_tx_shared_cta_b64(uint32_t barrier, int bytes);
void mbarrier_try_wait_parity_shared_cta_b64(bool& done, uint32_t barrier, uint32_t parity);
void selp_u32(uint32_t& to, uint32_t a, uint32_t b, bool first);
void ld_shared_v4_b32(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t from);
void mapa_shared_cluster_u32(uint32_t& to, uint32_t address, uint32_t rank);
void ld_shared_cluster_v4_f32(float& x, float& y, float& z, float& w, uint32_t from);
void barrier_cluster_arrive_release();
void barrier_cluster_wait_acquire();
void prefetch_tensormap(const void* map);
void cp_async_bulk_prefetch_L2_global(const void* from, int bytes);
void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(uint32_t to, const void* from, int bytes,
                                                                    uint32_t barrier);
void cp_async_bulk_tensor_2d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(uint32_t to, const void* map,
                                                                                   int column, int row,
                                                                                   uint32_t barrier);
void cp_async_bulk_tensor_4d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(uint32_t to, const void* map,
                                                                                   int channel, int x, int y, int image,
                                                                                   uint32_t barrier);
void cp_async_bulk_tensor_4d_shared_cluster_global_im2col_mbarrier_complete_tx_bytes(uint32_t to, const void* map,
                                                                                     int channel, int x, int y,
                                                                                     int image, uint32_t barrier,
                                                                                     unsigned short right,
                                                                                     unsigned short down);
void cp_async_bulk_tensor_2d_global_shared_cta_tile_bulk_group(const void* map, int column, int row, uint32_t from);
void cp_async_bulk_commit_group();
void cp_async_bulk_wait_group_read(int pending);
void wgmma_fence_sync_aligned();
void wgmma_commit_group_sync_aligned();
void wgmma_wait_group_sync_aligned(int pending);

// What a thread hands over: its sums, its part of a or a's descriptor, and b's.
struct WgmmaLane {
  float* sums[64];
  uint32_t a[4];
  uint64_t a_matrix, b_matrix;
  bool accumulates;
};
enum class WgmmaType { kTf32, kFloat16, kBFloat16 };
void wgmma(WgmmaLane& own, WgmmaType type, int columns, bool a_in_registers);

template <WgmmaType Type, int Columns, typename... Operands>
void wgmma_of(Operands&&... operands) {
  constexpr int kSums = Columns / 2, kRest = int(sizeof...(Operands)) - kSums;
  // Behind the sums: a's four registers or its descriptor, b's, whether it adds to the sums, and scales.
  constexpr bool kInRegisters = kRest == (Type == WgmmaType::kTf32 ? 8 : 9);
  static_assert(kInRegisters || kRest == (Type == WgmmaType::kTf32 ? 5 : 7));
  WgmmaLane own{};
  uint64_t rest[kRest];
  int at = 0;
  const auto take = [&](auto& operand) {
    if (at < kSums) {
      if constexpr (std::is_same_v<std::decay_t<decltype(operand)>, float>) own.sums[at] = &operand;
    } else {
      rest[at - kSums] = uint64_t(operand);
    }
    ++at;
  };
  (take(operands), ...);
  if constexpr (kInRegisters) {
    for (int i = 0; i < 4; ++i) own.a[i] = uint32_t(rest[i]);
    own.b_matrix = rest[4], own.accumulates = rest[5] != 0;
  } else {
    own.a_matrix = rest[0], own.b_matrix = rest[1], own.accumulates = rest[2] != 0;
  }
  wgmma(own, Type, Columns, kInRegisters);
}

#define AI3_EMULATED_WGMMA(columns, name, type)                                   \
  template <typename... Operands>                                                 \
  void wgmma_mma_async_sync_aligned_m64n##columns##name(Operands&&... operands) { \
    wgmma_of<WgmmaType::type, columns>(std::forward<Operands>(operands)...);      \
  }
#define AI3_EMULATED_WGMMAS(columns)                     \
  AI3_EMULATED_WGMMA(columns, k8_f32_tf32_tf32, kTf32)   \
  AI3_EMULATED_WGMMA(columns, k16_f32_f16_f16, kFloat16) \
  AI3_EMULATED_WGMMA(columns, k16_f32_bf16_bf16, kBFloat16)
AI3_EMULATED_WGMMAS(32)
AI3_EMULATED_WGMMAS(64)
AI3_EMULATED_WGMMAS(128)
#undef AI3_EMULATED_WGMMAS
#undef AI3_EMULATED_WGMMA

}  // namespace ai3_emulation::ptx
