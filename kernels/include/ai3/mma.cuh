// The instructions of a matrix product on tensor cores: copies to shared memory, fragments, mma.sync (sm_80 and newer)
// and wgmma (sm_90a).
// Source: the PTX ISA, "Asynchronous copy", "Warp-level matrix instructions", "Asynchronous warpgroup-level matrix
// instructions".
#pragma once

#include <ai3/half.cuh>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define AI3_WGMMA 1
#else
#define AI3_WGMMA 0
#endif

namespace ai3 {

enum class Math { kFloat16, kBFloat16, kTf32, kFloat32 };  // kFloat32: three products in TF32

template <Math M>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<Math::kFloat16> {
  using type = Half;
};
template <>
struct ElementOf<Math::kBFloat16> {
  using type = BFloat16;
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes; zeros where `inside` is false, and nothing is read.
__device__ __forceinline__ void copy_async_cached(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Waits until at most about `pending` groups of copies are not done.
__device__ __forceinline__ void wait_all_but(int pending) {
  if (pending >= 9) return wait_copies<9>();
  if (pending >= 5) return wait_copies<5>();
  if (pending >= 3) return wait_copies<3>();
  if (pending == 2) return wait_copies<2>();
  if (pending == 1) return wait_copies<1>();
  wait_copies<0>();
}

// Four 8x8 matrices of 16 bits (8x4 of 32), each by the addresses of its rows in eight threads.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same with each matrix of 16 bits transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d += a b for 16 rows, 8 columns and 32 bytes of depth.
template <Math M>
__device__ __forceinline__ void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define AI3_MMA(shape_and_types)                                                                            \
  asm volatile("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (M == Math::kFloat16) {
    AI3_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else if constexpr (M == Math::kBFloat16) {
    AI3_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    AI3_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef AI3_MMA
}

// To TF32, of which products read the first 19 bits alone: what they cut off would add up to a bias. NaN and infinities
// stay.
__device__ __forceinline__ uint32_t rounded_tf32(uint32_t a) {
  return fabsf(__uint_as_float(a)) < __uint_as_float(0x7f800000u) ? a + 0x1000u : a;
}

// a = high + low, each to be read as TF32: to 2^-22 of a.
__device__ __forceinline__ void split_tf32(uint32_t a, uint32_t& high, uint32_t& low) {
  high = rounded_tf32(a) & 0xffffe000u;
  low = __float_as_uint(__uint_as_float(a) - __uint_as_float(high)) + 0x1000u;
}

__device__ __forceinline__ uint32_t load_where(const uint32_t* from, bool inside) {
  uint32_t x;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.b32 %0, [%1];\n}"
               : "=r"(x)
               : "l"(from), "r"(int(inside)));
  return x;
}
__device__ __forceinline__ unsigned short load_where(const unsigned short* from, bool inside) {
  unsigned short x;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b16 %0, 0;\n@p ld.global.b16 %0, [%1];\n}"
               : "=h"(x)
               : "l"(from), "r"(int(inside)));
  return x;
}

#if AI3_WGMMA

__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t at, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// A kernel that is launched for it does its own part while those before it still run, up to here: all that they wrote
// is there then. None lets the next one begin by itself (griddepcontrol.launch_dependents), as not all of cuDNN's
// kernels wait, and the workspace that one of them prepares may be memory that this kernel still reads: graph_edges.h
// makes those edges along which a kernel that waits may begin.
__device__ __forceinline__ void wait_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// What this thread wrote to shared memory becomes visible to wgmma after a barrier.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A matrix in shared memory whose rows are 128 bytes of depth, their 16-byte parts permuted by the address in units of
// 128 bytes modulo 8; `eight_rows` bytes from eight rows to the next.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t eight_rows = 1024) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | uint64_t(eight_rows >> 4) << 32 | uint64_t(1) << 16 | ((address & 0x3ffff) >> 4);
}

#define AI3_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define AI3_ONES "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,"
#define AI3_NAMES_16 AI3_ONES "%10,%11,%12,%13,%14,%15"
#define AI3_NAMES_32 AI3_ONES AI3_TEN(1) AI3_TEN(2) "%30,%31"
#define AI3_NAMES_64 AI3_ONES AI3_TEN(1) AI3_TEN(2) AI3_TEN(3) AI3_TEN(4) AI3_TEN(5) "%60,%61,%62,%63"
#define AI3_EIGHT(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define AI3_REGISTERS_16 AI3_EIGHT(0), AI3_EIGHT(8)
#define AI3_REGISTERS_32 AI3_EIGHT(0), AI3_EIGHT(8), AI3_EIGHT(16), AI3_EIGHT(24)
#define AI3_REGISTERS_64 AI3_REGISTERS_32, AI3_EIGHT(32), AI3_EIGHT(40), AI3_EIGHT(48), AI3_EIGHT(56)

// d += a b for the 64 rows of a warpgroup, N columns and 32 bytes of depth; d = a b where `accumulate` is 0.
template <Math M, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(N == 32 || N == 64 || N == 128, "has instructions for these");
#define AI3_WGMMA_OF(type, scales, n, names, flag, operands, ...)                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n type " {" names \
               "}, " operands ", p, 1, 1" scales ";\n}"                                                              \
               : __VA_ARGS__                                                                                         \
               : "l"(a), "l"(b), "r"(accumulate))
#define AI3_WGMMA_SIZES(type, scales)                                                   \
  if constexpr (N == 32) {                                                              \
    AI3_WGMMA_OF(type, scales, 32, AI3_NAMES_16, "%18", "%16, %17", AI3_REGISTERS_16);  \
  } else if constexpr (N == 64) {                                                       \
    AI3_WGMMA_OF(type, scales, 64, AI3_NAMES_32, "%34", "%32, %33", AI3_REGISTERS_32);  \
  } else {                                                                              \
    AI3_WGMMA_OF(type, scales, 128, AI3_NAMES_64, "%66", "%64, %65", AI3_REGISTERS_64); \
  }
  if constexpr (M == Math::kFloat16) {
    AI3_WGMMA_SIZES("k16.f32.f16.f16", ", 0, 0")
  } else if constexpr (M == Math::kBFloat16) {
    AI3_WGMMA_SIZES("k16.f32.bf16.bf16", ", 0, 0")
  } else {
    AI3_WGMMA_SIZES("k8.f32.tf32.tf32", "")
  }
#undef AI3_WGMMA_SIZES
#undef AI3_WGMMA_OF
}

// The same with a in registers.
template <Math M, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(N == 32 || N == 64 || N == 128, "has instructions for these");
#define AI3_WGMMA_OF(type, scales, n, names, flag, operands, ...)                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n type " {" names \
               "}, " operands ", p, 1, 1" scales ";\n}"                                                              \
               : __VA_ARGS__                                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
#define AI3_WGMMA_SIZES(type, scales)                                                                 \
  if constexpr (N == 32) {                                                                            \
    AI3_WGMMA_OF(type, scales, 32, AI3_NAMES_16, "%21", "{%16,%17,%18,%19}, %20", AI3_REGISTERS_16);  \
  } else if constexpr (N == 64) {                                                                     \
    AI3_WGMMA_OF(type, scales, 64, AI3_NAMES_32, "%37", "{%32,%33,%34,%35}, %36", AI3_REGISTERS_32);  \
  } else {                                                                                            \
    AI3_WGMMA_OF(type, scales, 128, AI3_NAMES_64, "%69", "{%64,%65,%66,%67}, %68", AI3_REGISTERS_64); \
  }
  if constexpr (M == Math::kFloat16) {
    AI3_WGMMA_SIZES("k16.f32.f16.f16", ", 0")
  } else if constexpr (M == Math::kBFloat16) {
    AI3_WGMMA_SIZES("k16.f32.bf16.bf16", ", 0")
  } else {
    AI3_WGMMA_SIZES("k8.f32.tf32.tf32", "")
  }
#undef AI3_WGMMA_SIZES
#undef AI3_WGMMA_OF
}

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the barrier's phase end only after so many bytes are copied.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, "
        "p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

__device__ __forceinline__ void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Rows of a matrix from `row` on, of a block of its columns.
__device__ __forceinline__ void copy_matrix(uint32_t to, const void* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// Back from shared memory, but for what lies outside of the matrix; wait_stores() waits until all of this thread's are
// read there.
__device__ __forceinline__ void store_matrix(const void* map, int column, int row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(column), "r"(row), "r"(from)
               : "memory");
}
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
// A block of channels of a rectangle of an image's pixels, zeros where it reaches out of the image.
__device__ __forceinline__ void copy_image(uint32_t to, const void* map, int channel, int x, int y, int image,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(channel), "r"(x), "r"(y), "r"(image), "r"(barrier)
      : "memory");
}
// A block of channels of one tap for the output pixels from the one whose window begins at (x, y) on.
__device__ __forceinline__ void copy_windows(uint32_t to, const void* map, int channel, int x, int y, int image,
                                             int right, int down, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
      "%5}], "
      "[%6], {%7, %8};" ::"r"(to),
      "l"(map), "r"(channel), "r"(x), "r"(y), "r"(image), "r"(barrier), "h"(static_cast<unsigned short>(right)),
      "h"(static_cast<unsigned short>(down))
      : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// To the L2 cache alone: what is written there meanwhile is still what is read.
__device__ __forceinline__ void prefetch_bulk(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Every thread of the cluster, whether or not its warp has come together; what was written to shared memory before is
// seen after.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// Four floats of the shared memory of another block of the cluster.
__device__ __forceinline__ float4 load_of_block(uint32_t address, uint32_t rank) {
  float4 v;
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
  return v;
}

#endif

}  // namespace ai3
