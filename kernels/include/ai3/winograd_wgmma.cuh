// As winograd_products.cuh, by Hopper's tensor cores (sm_90a): warpgroups of 128 threads that multiply 64 rows each.
#pragma once

#include <ai3/winograd_products.cuh>

namespace ai3 {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// D = A B^T, and D += A B^T: 64 rows of A in registers by 64 of B in shared memory, over 8 channels.
__device__ __forceinline__ void wgmma_set(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1;}"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]), "=f"(d[7]), "=f"(d[8]),
        "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]), "=f"(d[13]), "=f"(d[14]), "=f"(d[15]), "=f"(d[16]),
        "=f"(d[17]), "=f"(d[18]), "=f"(d[19]), "=f"(d[20]), "=f"(d[21]), "=f"(d[22]), "=f"(d[23]), "=f"(d[24]),
        "=f"(d[25]), "=f"(d[26]), "=f"(d[27]), "=f"(d[28]), "=f"(d[29]), "=f"(d[30]), "=f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_add(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// A matrix of rows of 64 bytes, its 16-byte vectors in the 64-byte swizzle.
__device__ __forceinline__ uint64_t descriptor_of(uint32_t shared) {
  return uint64_t{2} << 62 | uint64_t{512 >> 4} << 32 | uint64_t{1} << 16 | (shared & 0x3ffff) >> 4;
}

// A block's tile of C = A B^T, of Rows rows of A, a multiple of 64, and 64 of B; `blocks` is even.
template <int Rows, int Stages>
__device__ __forceinline__ void multiply_tile_wgmma(const float* a, int a_stride, const float* b, int b_stride,
                                                    int blocks, float* c, int c_stride) {
  // A stage: twice B, of which the tensor cores take the high parts, and B's low parts; then twice A. Of its three
  // users, the copies are a stage or more ahead and the tensor cores' products one behind.
  constexpr int kThreads = Rows * 2, kAhead = Stages - 2, kVectorsB = 64 * kDepth / 4, kVectorsA = Rows * kDepth / 4;
  constexpr int kB = 64 * kDepth, kA = Rows * kDepth, kStage = 2 * (2 * kB + kA);
  extern __shared__ __align__(128) float shared[];
  const int thread = threadIdx.x, warp = thread / 32, group = thread % 32 / 4, quad = thread % 4;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int place_b = swizzled(thread) * 4;
  a += thread * 4;
  b += thread * 4;

  const auto fetch = [&](int step) {
    if (step * 2 < blocks) {
      const uint32_t to_b = base + (step % Stages * kStage + place_b) * 4;
      const uint32_t to_a = base + (step % Stages * kStage + 4 * kB + thread * 4) * 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kVectorsB; i += kThreads) copy_async(to_b + half * (kB * 8) + i * 16, b + i * 4);
#pragma unroll
        for (int i = 0; i < kVectorsA; i += kThreads) copy_async(to_a + half * (kA * 4) + i * 16, a + i * 4);
        a += a_stride;
        b += b_stride;
      }
    }
    commit_copies();
  };

  float4 x[2][2];  // channels of A, by halves of a step's channels and of a warp's rows
  const auto prepare = [&](int step) {
    float* stage = shared + step % Stages * kStage;
    wait_copies<kAhead - 1>();
    // Each thread splits what it has copied. The tensor cores cut off what high parts have beyond TF32.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kVectorsB; i += kThreads) {
        float* at = stage + half * (2 * kB) + place_b + i * 4;
        float4 y = *reinterpret_cast<const float4*>(at);
        float* values = &y.x;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float low = values[k] - __uint_as_float(__float_as_uint(values[k]) & 0xffffe000u);
          values[k] = __uint_as_float(__float_as_uint(low) + 0x1000u);
        }
        *reinterpret_cast<float4*>(at + kB) = y;
      }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    fetch(step + kAhead);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int rows = 0; rows < 2; ++rows)
        x[half][rows] = *reinterpret_cast<const float4*>(stage + 4 * kB + half * kA +
                                                         (warp * 16 + rows * 8 + group) * kDepth + quad * 4);
  };

  float sum[32] = {};
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) fetch(stage);
  prepare(0);
  for (int step = 0; step * 2 < blocks; ++step) {
    uint32_t high_a[4][4], low_a[4][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int rows = 0; rows < 2; ++rows) {
        const float4 y = x[half][rows];
        split_tf32(y.x, high_a[half * 2][rows], low_a[half * 2][rows]);
        split_tf32(y.y, high_a[half * 2][rows + 2], low_a[half * 2][rows + 2]);
        split_tf32(y.z, high_a[half * 2 + 1][rows], low_a[half * 2 + 1][rows]);
        split_tf32(y.w, high_a[half * 2 + 1][rows + 2], low_a[half * 2 + 1][rows + 2]);
      }
    }
    const uint64_t high_b = descriptor_of(base + step % Stages * (kStage * 4));
    constexpr int kLow = kB * 4 >> 4;  // in a descriptor's units, as are the places of 8 channels below
    float part[32];
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    // The small terms first, so that little is lost of the large ones.
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t at = high_b + k / 2 * (kB * 8 >> 4) + k % 2 * (32 >> 4);
      if (k == 0)
        wgmma_set(part, low_a[k], at);
      else
        wgmma_add(part, low_a[k], at);
      wgmma_add(part, high_a[k], at + kLow);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_add(part, high_a[k], high_b + k / 2 * (kB * 8 >> 4) + k % 2 * (32 >> 4));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (step * 2 + 2 < blocks) prepare(step + 1);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      asm volatile("" : "+f"(part[i])::"memory");  // read after the wait
      sum[i] += part[i];
    }
  }
#pragma unroll
  for (int rows = 0; rows < 2; ++rows) {
    float* to = c + (warp * 16 + rows * 8 + group) * c_stride + quad * 4;
#pragma unroll
    for (int i = 0; i < 32; i += 8)
      *reinterpret_cast<float4*>(to + i * 2) =
          make_float4(sum[i + rows * 2], sum[i + rows * 2 + 1], sum[i + rows * 2 + 4], sum[i + rows * 2 + 5]);
  }
}

#endif

}  // namespace ai3
