// Attention of few queries and keys on tensor cores, as of the windows of a Swin: a block of threads a head, a warp 16
// of its queries, whose scores and their softmax stay in registers.
// Source: Dao et al., "FlashAttention" (2022), whose blocks of keys are one here; mma.m16n8k16 by the PTX ISA.
#include <ai3/window.cuh>

#ifdef __CUDACC__
#include <ai3/gemm_parts.cuh>
#include <ai3/mma.cuh>
#endif

namespace {

constexpr int kThreads = 128, kMost = 64;  // queries, keys and features
constexpr int kLeading = 6;                // dimensions before the last two

struct Matrices {
  const void* data;
  int64_t stride[kLeading], row;  // elements between neighbours in each leading dimension, and between rows
};

struct Params {
  Matrices query, key, value, bias, mask, output;
  int64_t size[kLeading];  // the leading dimensions, the last ones first
  float scale;
  int32_t queries, keys, depth, width;  // depth: features of a query and of a key; width: of a value
  int32_t is_causal, masked_is_zero;
  int32_t whole, pairs;  // whether 16 bytes of what is read, and 4 of what is written, can be accessed at once
};

}  // namespace

#ifdef __CUDACC__

namespace {

template <typename T>
__device__ __forceinline__ const T* of_head(const Params& p, const Matrices& m) {
  int64_t left = blockIdx.x, at = 0;
#pragma unroll
  for (int d = 0; d < kLeading; ++d) {
    at += left % p.size[d] * m.stride[d];
    left /= p.size[d];
  }
  return static_cast<const T*>(m.data) + at;
}

// Rows of a head in shared memory, kPitch elements apart, with zeros around.
template <typename T, int Features>
__device__ __forceinline__ void stage(const Params& p, const Matrices& m, T* to, int rows, int features) {
  constexpr int kPitch = Features + 8, kParts = Features / 8;
  const T* from = of_head<T>(p, m);
  if (p.whole) {
    for (int i = threadIdx.x; i < kMost * kParts; i += kThreads) {
      const int row = i / kParts, part = i % kParts * 8;
      const bool is_inside = row < rows && part < features;
      const uint4 words = is_inside ? *reinterpret_cast<const uint4*>(from + row * m.row + part) : uint4{0, 0, 0, 0};
      *reinterpret_cast<uint4*>(to + row * kPitch + part) = words;
    }
    return;
  }
  for (int i = threadIdx.x; i < kMost * Features; i += kThreads) {
    const int row = i / Features, feature = i % Features;
    to[row * kPitch + feature] = row < rows && feature < features ? from[row * m.row + feature] : T{0};
  }
}

template <ai3::Math M, int Features>
__device__ __forceinline__ void attend(const Params& p) {
  using T = typename ai3::ElementOf<M>::type;
  constexpr int kPitch = Features + 8, kKeyTiles = kMost / 8, kTiles = Features / 8;
  constexpr float kLog2E = 1.44269504f;
  const float kInfinity = __uint_as_float(0x7f800000u);
  __shared__ __align__(16) T queries[kMost * kPitch], keys[kMost * kPitch], values[kMost * kPitch];
  stage<T, Features>(p, p.query, queries, p.queries, p.depth);
  stage<T, Features>(p, p.key, keys, p.keys, p.depth);
  stage<T, Features>(p, p.value, values, p.keys, p.width);
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp * 16;
  if (first >= p.queries) return;
  float scores[kKeyTiles][4] = {};
#pragma unroll
  for (int k = 0; k < Features / 16; ++k) {
    uint32_t a[4], b[4];
    ai3::load_matrices(a, ai3::shared_address(queries + (first + lane % 16) * kPitch + k * 16 + lane / 16 * 8));
#pragma unroll
    for (int j = 0; j < kKeyTiles; j += 2) {
      const int row = j * 8 + lane / 16 * 8 + lane % 8, column = k * 16 + lane / 8 % 2 * 8;
      ai3::load_matrices(b, ai3::shared_address(keys + row * kPitch + column));
      ai3::mma<M>(scores[j], a, b[0], b[1]);
      ai3::mma<M>(scores[j + 1], a, b[2], b[3]);
    }
  }

  const T* terms[2] = {p.bias.data == nullptr ? nullptr : of_head<T>(p, p.bias),
                       p.mask.data == nullptr ? nullptr : of_head<T>(p, p.mask)};
  const int64_t rows[2] = {p.bias.row, p.mask.row};
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first + lane / 4 + half * 8;
    float most = -kInfinity, sum = 0;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = j * 8 + lane % 4 * 2 + e;
        float& score = scores[j][half * 2 + e];
        score *= p.scale;
        const bool is_seen = query < p.queries && key < p.keys && !(p.is_causal && key > query);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          if (terms[t] != nullptr && is_seen) score += ai3::widen(terms[t][query * rows[t] + key]);
        }
        score = is_seen ? score : -kInfinity;
        most = fmaxf(most, score);
      }
    }
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
    // A row that sees no key is zeros, or what infinity less infinity is.
    const float least = most == -kInfinity && p.masked_is_zero ? 0 : most;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[j][half * 2 + e];
        score = exp2f((score - least) * kLog2E);
        sum += score;
      }
    }
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    inverse[half] = sum == 0 ? 0 : 1 / sum;
  }

  float out[kTiles][4] = {};
#pragma unroll
  for (int k = 0; k < kMost / 16; ++k) {
    const float *low = scores[2 * k], *high = scores[2 * k + 1];
    const uint32_t a[4] = {ai3::narrow_pair<T>(low[0], low[1]), ai3::narrow_pair<T>(low[2], low[3]),
                           ai3::narrow_pair<T>(high[0], high[1]), ai3::narrow_pair<T>(high[2], high[3])};
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t b[4];
      const int row = k * 16 + lane / 8 % 2 * 8 + lane % 8, column = j * 8 + lane / 16 * 8;
      ai3::load_transposed(b, ai3::shared_address(values + row * kPitch + column));
      ai3::mma<M>(out[j], a, b[0], b[1]);
      ai3::mma<M>(out[j + 1], a, b[2], b[3]);
    }
  }

  T* to = const_cast<T*>(of_head<T>(p, p.output));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first + lane / 4 + half * 8;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int column = j * 8 + lane % 4 * 2;
      if (query >= p.queries || column >= p.width) continue;
      const uint32_t pair = ai3::narrow_pair<T>(out[j][half * 2] * inverse[half], out[j][half * 2 + 1] * inverse[half]);
      T* at = to + query * p.output.row + column;
      if (p.pairs) {
        *reinterpret_cast<uint32_t*>(at) = pair;
      } else {
        at[0] = T{static_cast<unsigned short>(pair & 0xffff)};
        if (column + 1 < p.width) at[1] = T{static_cast<unsigned short>(pair >> 16)};
      }
    }
  }
}

}  // namespace

AI3_KERNEL(kThreads, attend_32_f16, Params) { attend<ai3::Math::kFloat16, 32>(p); }
AI3_KERNEL(kThreads, attend_64_f16, Params) { attend<ai3::Math::kFloat16, 64>(p); }
AI3_KERNEL(kThreads, attend_32_bf16, Params) { attend<ai3::Math::kBFloat16, 32>(p); }
AI3_KERNEL(kThreads, attend_64_bf16, Params) { attend<ai3::Math::kBFloat16, 64>(p); }

#else

namespace {

static_assert(kLeading == AI3_MAX_DIMS - 2);

const char* supports(const ai3_args* a) {
  if (a->dtype != AI3_FLOAT16 && a->dtype != AI3_BFLOAT16) return "needs float16 or bfloat16";
  const int last = a->output.ndim - 1;
  const int64_t keys = a->key.size[last - 1], depth = a->input.size[last];
  if (keys == 0 || depth == 0) return "needs at least one key of one feature";
  if (a->output.size[last - 1] > kMost || keys > kMost) return "has more than 64 queries or keys";
  if (depth > kMost || a->output.size[last] > kMost) return "has more than 64 features";
  return nullptr;
}

Matrices matrices(const ai3_tensor& t) {
  Matrices m{t.data, {}, 0};
  if (t.ndim == 0) return m;
  m.row = t.stride[t.ndim - 2];
  for (int d = 0; d < t.ndim - 2; ++d) m.stride[d] = t.stride[t.ndim - 3 - d];
  return m;
}

void run(const ai3_args* a) {
  const int last = a->output.ndim - 1;
  Params p{matrices(a->input),
           matrices(a->key),
           matrices(a->value),
           matrices(a->score_bias),
           matrices(a->score_mask),
           matrices(a->output),
           {},
           float(a->scale)};
  int64_t heads = 1;
  for (int d = 0; d < kLeading; ++d) {
    p.size[d] = d < last - 1 ? a->output.size[last - 2 - d] : 1;
    heads *= p.size[d];
  }
  p.queries = int(a->output.size[last - 1]), p.keys = int(a->key.size[last - 1]);
  p.depth = int(a->input.size[last]), p.width = int(a->output.size[last]);
  p.is_causal = a->is_causal, p.masked_is_zero = a->masked_is_zero;
  const auto divides = [&](const Matrices& m, int64_t elements) {
    bool all = reinterpret_cast<uintptr_t>(m.data) % size_t(elements * 2) == 0 && m.row % elements == 0;
    for (int d = 0; d < kLeading; ++d) all = all && (p.size[d] == 1 || m.stride[d] % elements == 0);
    return all;
  };
  p.whole = p.depth % 8 == 0 && p.width % 8 == 0 && divides(p.query, 8) && divides(p.key, 8) && divides(p.value, 8);
  p.pairs = p.width % 2 == 0 && divides(p.output, 2);
  const std::string features = std::max(p.depth, p.width) <= 32 ? "attend_32" : "attend_64";
  ai3::cuda::launch(a, ai3::dtype_name(features.c_str(), a->dtype).c_str(), {heads}, kThreads, 0, p);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "attention",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = 0,
                           .supports = supports,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }

#endif
