// What the kernels of attention on a GPU share: where the matrices of a head lie, and what the scores in a warp's
// registers become.
// Source: Dao et al., "FlashAttention" (2022), algorithm 1; Milakov and Gimelshein, "Online normalizer calculation for
// softmax" (2018), algorithm 3.
#pragma once

#include <ai3/window.cuh>

namespace ai3 {

constexpr int kAttentionThreads = 128, kAttentionQueries = 64;  // of a block, 16 queries a warp
constexpr int kAttentionKeys = 64;                              // that are in shared memory at a time
constexpr int kAttentionLeading = 6;                            // dimensions before the last two

struct AttentionMatrices {
  const void* data;
  int64_t stride[kAttentionLeading], row;  // elements between neighbours in each leading dimension, and between rows
};

enum AttentionMatrix { kQuery, kKey, kValue, kBias, kMask, kOutput, kAttentionMatrices };

struct AttentionParams {
  AttentionMatrices matrices[kAttentionMatrices];
  int32_t size[kAttentionLeading];  // the leading dimensions, the last ones first
  float scale;
  int32_t queries, keys, depth, width;  // depth: features of a query and of a key; width: of a value
  int32_t query_tiles;                  // blocks of threads for a head
  int32_t is_causal, masked_is_zero;
  int32_t whole, parts;  // whether 16 bytes of what is read, and 4 elements of float32 or 2 halves of what is written,
                         // can be accessed at once
};

#ifdef __CUDACC__

// Where the matrices of one head begin: found by a thread for each, and kept in shared memory to spare registers.
struct AttentionHead {
  const AttentionParams& p;
  const int64_t* offsets;

  __device__ __forceinline__ AttentionHead(const AttentionParams& params, unsigned head,
                                           int64_t (&shared)[kAttentionMatrices])
      : p(params), offsets(shared) {
    if (threadIdx.x < kAttentionMatrices) {
      int64_t at = 0;
      for (int d = 0; d < kAttentionLeading; ++d) {
        const unsigned size = p.size[d];
        at += head % size * p.matrices[threadIdx.x].stride[d];
        head /= size;
      }
      shared[threadIdx.x] = at;
    }
    __syncthreads();
  }

  // Null where there is no such matrix.
  template <typename T>
  __device__ __forceinline__ const T* begin(AttentionMatrix m) const {
    const T* data = static_cast<const T*>(p.matrices[m].data);
    return data == nullptr ? nullptr : data + offsets[m];
  }
};

// The weights of the values for the two queries of which a thread has scores, as mma leaves them: query and keys by
// lane / 4 and lane % 4. What is summed is divided by the weights' sum in the end.
template <typename T>
struct AttentionSoftmax {
  const AttentionParams& p;
  const T* terms[2];  // bias and mask of the head, or null
  float most[2], sum[2] = {0, 0};

  __device__ __forceinline__ AttentionSoftmax(const AttentionParams& params, const AttentionHead& head)
      : p(params), terms{head.begin<T>(kBias), head.begin<T>(kMask)}, most{-infinity(), -infinity()} {}

  static __device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

  // Products of the queries from `first_query` on and the keys from `first_key` on become weights; `earlier` is what
  // sums over earlier keys are to be multiplied by.
  template <int KeyTiles>
  __device__ __forceinline__ void weigh(float (&scores)[KeyTiles][4], int first_query, int first_key,
                                        float (&earlier)[2]) {
    constexpr float kLog2E = 1.44269504f;
    const int lane = threadIdx.x % 32;
    const int64_t rows[2] = {p.matrices[kBias].row, p.matrices[kMask].row};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first_query + lane / 4 + half * 8, key = first_key + lane % 4 * 2;
      const int end = query >= p.queries ? 0 : p.is_causal ? min(p.keys, query + 1) : p.keys;
      const int left = end - key;  // those that the query sees
#pragma unroll
      for (int j = 0; j < KeyTiles; ++j) {
        scores[j][half * 2] *= p.scale;
        scores[j][half * 2 + 1] *= p.scale;
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        if (terms[t] == nullptr) continue;
        const T* term = terms[t] + query * rows[t] + key;
#pragma unroll
        for (int j = 0; j < KeyTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (j * 8 + e < left) scores[j][half * 2 + e] += widen(term[j * 8 + e]);
          }
        }
      }
      float largest = most[half];
#pragma unroll
      for (int j = 0; j < KeyTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[j][half * 2 + e];
          score = j * 8 + e < left ? score : -infinity();
          largest = fmaxf(largest, score);
        }
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
      const float least = largest == -infinity() ? 0 : largest;  // of no key that is seen so far
      earlier[half] = exp2f((most[half] - least) * kLog2E);
      most[half] = largest;
      sum[half] *= earlier[half];
#pragma unroll
      for (int j = 0; j < KeyTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[j][half * 2 + e];
          score = exp2f((score - least) * kLog2E);
          sum[half] += score;
        }
      }
    }
  }

  // A row that sees no key is zeros, or what infinity less infinity is.
  __device__ __forceinline__ float inverse(int half) const {
    float all = sum[half] + __shfl_xor_sync(0xffffffff, sum[half], 1);
    all += __shfl_xor_sync(0xffffffff, all, 2);
    return all != 0 ? 1 / all : p.masked_is_zero ? 0 : __uint_as_float(0x7fc00000u);
  }
};

#endif

}  // namespace ai3
