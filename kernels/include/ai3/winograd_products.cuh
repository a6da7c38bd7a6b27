// Batched matrix products in float32 accuracy on tensor cores that multiply TF32. Each operand is split into two TF32
// numbers, x = high + low, and three of the four products are summed: high * high + high * low + low * high.
// Source: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32
// theoretical peak performance", 2022, arXiv 2203.03341. As there, the tensor cores, which round sums toward zero, sum
// only a step's 16 or 32 channels; the steps are added up outside of them, rounded to nearest. What is lost of a
// product, low * low and the ends of the low parts, is below 2^-20 of it, and of either sign.
#pragma once

namespace ai3 {

constexpr int kDepth = 16;  // channels of a block

__device__ __forceinline__ void split_tf32(float x, uint32_t& high, uint32_t& low) {
  const bool is_finite = fabsf(x) < __uint_as_float(0x7f800000u);  // NaN stays one
  high = (__float_as_uint(x) + (is_finite ? 0x1000u : 0)) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high));  // the tensor cores ignore its last 13 bits
}

// Operands are in blocks of 16 channels, [blocks][rows][16], and a row of B in this order: where a thread has 4
// successive slots of it, it has the channels quad, quad + 4, quad + 8 and quad + 12, and where a thread has 4
// successive channels of A, the tensor cores take those for the slots quad, quad + 4, quad + 8 and quad + 12.
__device__ __forceinline__ int channel_of_slot(int slot) { return slot % 4 * 4 + slot / 4; }

// The column of C of a row of B. Of 16 columns, a thread has 2 of each of two products, which become adjacent.
__device__ __forceinline__ int column_of_row(int row) {
  return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
}

// The place of the 16-byte vectors of rows of 64 bytes in shared memory: Hopper's 64-byte swizzle.
__device__ __forceinline__ int swizzled(int vector) { return vector ^ (vector >> 3 & 3); }

__device__ __forceinline__ void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void copy_async(uint32_t shared, const float* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// A block's tile of C = A B^T, of Rows rows of A and Columns of B, by warps of WarpRows x WarpColumns. The tile's rows
// of a block of channels are contiguous, a block `stride` elements apart from the next.
template <int Rows, int Columns, int WarpRows, int WarpColumns, int Stages>
__device__ __forceinline__ void multiply_tile(const float* a, int a_stride, const float* b, int b_stride, int blocks,
                                              float* c, int c_stride) {
  constexpr int kWarpsN = Columns / WarpColumns, kThreads = Rows / WarpRows * kWarpsN * 32;
  constexpr int kM = WarpRows / 16, kN = WarpColumns / 8;
  constexpr int kStage = (Rows + Columns) * kDepth, kVectors = kStage / 4, kVectorsA = Rows * kDepth / 4;
  extern __shared__ __align__(128) float shared[];
  const int thread = threadIdx.x, warp = thread / 32, group = thread % 32 / 4, quad = thread % 4;
  const int warp_m = warp / kWarpsN * WarpRows, warp_n = warp % kWarpsN * WarpColumns;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));

  const auto fetch = [&](int block) {
    if (block < blocks) {
      const uint32_t to = base + block % Stages * (kStage * 4);
#pragma unroll
      for (int i = 0; i < kVectors; i += kThreads) {
        const int vector = i + thread;
        if (kVectors % kThreads != 0 && vector >= kVectors) break;
        if (vector < kVectorsA)
          copy_async(to + swizzled(vector) * 16, a + vector * 4);
        else
          copy_async(to + vector * 16, b + (vector - kVectorsA) * 4);
      }
      a += a_stride;
      b += b_stride;
    }
    commit_copies();
  };

  float sum[kM][kN][4] = {};
#pragma unroll
  for (int stage = 0; stage < Stages - 1; ++stage) fetch(stage);
  for (int block = 0; block < blocks; ++block) {
    wait_copies<Stages - 2>();
    __syncthreads();
    fetch(block + Stages - 1);
    const float* stage = shared + block % Stages * kStage;
    uint32_t high_b[2][kN][2], low_b[2][kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int row = Rows + warp_n + n * 8 + group;
      const float4 x = *reinterpret_cast<const float4*>(stage + row * kDepth + quad * 4);
      split_tf32(x.x, high_b[0][n][0], low_b[0][n][0]);
      split_tf32(x.y, high_b[0][n][1], low_b[0][n][1]);
      split_tf32(x.z, high_b[1][n][0], low_b[1][n][0]);
      split_tf32(x.w, high_b[1][n][1], low_b[1][n][1]);
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint32_t high_a[2][4], low_a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_m + m * 16 + half * 8 + group;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = stage[swizzled(row * 4 + i) * 4 + quad];
          split_tf32(x, high_a[i / 2][half + i % 2 * 2], low_a[i / 2][half + i % 2 * 2]);
        }
      }
      float part[kN][4] = {};
      // The small terms first, so that little is lost of the large ones.
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int n = 0; n < kN; ++n) multiply_tf32(part[n], low_a[k], high_b[k][n]);
#pragma unroll
        for (int n = 0; n < kN; ++n) multiply_tf32(part[n], high_a[k], low_b[k][n]);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int n = 0; n < kN; ++n) multiply_tf32(part[n], high_a[k], high_b[k][n]);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] += part[n][i];
    }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* to = c + (warp_m + m * 16 + half * 8 + group) * c_stride + warp_n + quad * 4;
#pragma unroll
      for (int n = 0; n < kN; n += 2)
        *reinterpret_cast<float4*>(to + n * 8) = make_float4(sum[m][n][half * 2], sum[m][n][half * 2 + 1],
                                                             sum[m][n + 1][half * 2], sum[m][n + 1][half * 2 + 1]);
    }
  }
}

}  // namespace ai3
