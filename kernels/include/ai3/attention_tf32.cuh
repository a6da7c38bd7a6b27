// Attention of float32 in TF32: a block of threads has 64 queries of a head, a warp 16 of them in registers, and goes
// through the keys and values 64 at a time.
// Source: attention.cuh; mma.m16n8k8 by the PTX ISA.
#pragma once

#include <ai3/attention.cuh>

#ifdef __CUDACC__
#include <ai3/mma.cuh>

namespace ai3 {

// `rows` rows of a head from `first` on in shared memory, rounded to TF32, Pitch words apart, with zeros around.
template <int Features, int Pitch>
__device__ __forceinline__ void stage_tf32(const AttentionParams& p, const AttentionHead& head, AttentionMatrix m,
                                           uint32_t* to, int first, int rows, int features) {
  constexpr int kParts = Features / 4, kEach = 32 * kParts / kAttentionThreads;
  const float* from = head.begin<float>(m);
  const int64_t pitch = p.matrices[m].row;
  if (!p.whole) {
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * Features; i += kAttentionThreads) {
      const int row = i / Features, feature = i % Features;
      const bool is_inside = first + row < p.keys && feature < features;
      const float element = is_inside ? from[(first + row) * pitch + feature] : 0;
      to[row * Pitch + feature] = rounded_tf32(__float_as_uint(element));
    }
    return;
  }
#pragma unroll 1
  for (int begin = 0; begin < rows; begin += 32) {
    uint4 words[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int part = threadIdx.x + i * kAttentionThreads, row = first + begin + part / kParts;
      const int feature = part % kParts * 4;
      words[i] = row < p.keys && feature < features ? *reinterpret_cast<const uint4*>(from + row * pitch + feature)
                                                    : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int part = threadIdx.x + i * kAttentionThreads;
      const uint4 w = words[i];
      *reinterpret_cast<uint4*>(to + (begin + part / kParts) * Pitch + part % kParts * 4) = {
          rounded_tf32(w.x), rounded_tf32(w.y), rounded_tf32(w.z), rounded_tf32(w.w)};
    }
  }
}

// The order of what is summed over is free: a thread reads four features of a key, and four of each of two values, that
// lie side by side, as the fragments of two and of four products.
template <int Features>
__device__ __forceinline__ void attend_tf32(const AttentionParams& p) {
  // Threads of a quarter of a warp read all banks once with these pitches.
  constexpr int kKeyPitch = Features + 16, kValuePitch = Features + 4;
  constexpr int kKeyTiles = kAttentionKeys / 8, kTiles = Features / 8, kGroup = 4;  // of tiles of 8 keys
  __shared__ __align__(16) uint32_t keys[kAttentionKeys * kKeyPitch], values[kAttentionKeys * kValuePitch];
  __shared__ int64_t offsets[kAttentionMatrices];
  const int tile = blockIdx.x % p.query_tiles;
  const AttentionHead head(p, blockIdx.x / p.query_tiles, offsets);
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int first = tile * kAttentionQueries + threadIdx.x / 32 * 16;

  uint32_t queries[Features / 8][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first + row + half * 8;
    const float* from = head.begin<float>(kQuery) + query * p.matrices[kQuery].row;
#pragma unroll
    for (int k = 0; k < Features / 16; ++k) {
      const int feature = k * 16 + column * 4;
      float4 part{0, 0, 0, 0};
      if (p.whole) {
        if (query < p.queries && feature < p.depth) part = *reinterpret_cast<const float4*>(from + feature);
      } else if (query < p.queries) {
        if (feature < p.depth) part.x = from[feature];
        if (feature + 1 < p.depth) part.y = from[feature + 1];
        if (feature + 2 < p.depth) part.z = from[feature + 2];
        if (feature + 3 < p.depth) part.w = from[feature + 3];
      }
      const auto word = [](float f) { return rounded_tf32(__float_as_uint(f)); };
      queries[2 * k][half] = word(part.x), queries[2 * k][2 + half] = word(part.y);
      queries[2 * k + 1][half] = word(part.z), queries[2 * k + 1][2 + half] = word(part.w);
    }
  }

  AttentionSoftmax<float> softmax(p, head);
  float out[kTiles][4] = {};
  const int seen = p.is_causal ? min(p.keys, (tile + 1) * kAttentionQueries) : p.keys;
  for (int first_key = 0; first_key < seen; first_key += kAttentionKeys) {
    const int groups = min(kKeyTiles / kGroup, (seen - first_key + 8 * kGroup - 1) / (8 * kGroup));
    if (first_key > 0) __syncthreads();
    stage_tf32<Features, kKeyPitch>(p, head, kKey, keys, first_key, groups * kGroup * 8, p.depth);
    stage_tf32<Features, kValuePitch>(p, head, kValue, values, first_key, groups * kGroup * 8, p.width);
    __syncthreads();
    if (first >= p.queries) continue;

    float scores[kKeyTiles][4] = {};
#pragma unroll
    for (int g = 0; g < kKeyTiles / kGroup; ++g) {
      if (g >= groups) continue;
#pragma unroll
      for (int k = 0; k < Features / 16; ++k) {
#pragma unroll
        for (int j = g * kGroup; j < (g + 1) * kGroup; ++j) {
          const uint4 b = *reinterpret_cast<const uint4*>(keys + (j * 8 + row) * kKeyPitch + k * 16 + column * 4);
          mma<Math::kTf32>(scores[j], queries[2 * k], b.x, b.y);
          mma<Math::kTf32>(scores[j], queries[2 * k + 1], b.z, b.w);
        }
      }
    }

    float earlier[2];
    softmax.weigh(scores, first, first_key, earlier);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] *= earlier[e / 2];
    }

#pragma unroll
    for (int g = 0; g < kKeyTiles / kGroup; ++g) {
      if (g >= groups) continue;
#pragma unroll
      for (int k = g * kGroup; k < (g + 1) * kGroup; ++k) {
        const auto weight = [&](int e) { return rounded_tf32(__float_as_uint(scores[k][e])); };
        const uint32_t a[4] = {weight(0), weight(2), weight(1), weight(3)};
        const uint32_t* from = values + (k * 8 + column * 2) * kValuePitch + row * 4;
#pragma unroll
        for (int j = 0; j < kTiles; j += 4) {
          const uint4 low = *reinterpret_cast<const uint4*>(from + j * 8);
          const uint4 high = *reinterpret_cast<const uint4*>(from + kValuePitch + j * 8);
          mma<Math::kTf32>(out[j], a, low.x, high.x);
          mma<Math::kTf32>(out[j + 1], a, low.y, high.y);
          mma<Math::kTf32>(out[j + 2], a, low.z, high.z);
          mma<Math::kTf32>(out[j + 3], a, low.w, high.w);
        }
      }
    }
  }
  if (first >= p.queries) return;

  const float inverse[2] = {softmax.inverse(0), softmax.inverse(1)};
  float* to = const_cast<float*>(head.begin<float>(kOutput));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first + row + half * 8;
    if (query >= p.queries) continue;
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int at = j * 8 + column * 8 + part * 4, e = half * 2 + part;
        const float4 sums{out[j][e] * inverse[half], out[j + 1][e] * inverse[half], out[j + 2][e] * inverse[half],
                          out[j + 3][e] * inverse[half]};
        float* there = to + query * p.matrices[kOutput].row + at;
        if (p.parts && at < p.width) {
          *reinterpret_cast<float4*>(there) = sums;
        } else {
          if (at < p.width) there[0] = sums.x;
          if (at + 1 < p.width) there[1] = sums.y;
          if (at + 2 < p.width) there[2] = sums.z;
          if (at + 3 < p.width) there[3] = sums.w;
        }
      }
    }
  }
}

}  // namespace ai3

#endif
