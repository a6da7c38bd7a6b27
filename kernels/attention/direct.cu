// Attention on tensor cores, a warp for 16 queries of a head, whose scores and their softmax stay in registers: of
// float32 in TF32 (attention_tf32.cuh), and of halves with at most 64 queries and keys, as in the windows of a Swin.
// Source: attention.cuh, of whose blocks of keys halves have one; mma.m16n8k16 by the PTX ISA.
#include <ai3/attention_tf32.cuh>

#ifdef __CUDACC__
#include <ai3/gemm_parts.cuh>

namespace {

using Params = ai3::AttentionParams;
constexpr int kThreads = ai3::kAttentionThreads, kMost = ai3::kAttentionKeys;

// Rows of a head in shared memory, kPitch elements apart, with zeros around.
template <typename T, int Features>
__device__ __forceinline__ void stage(const Params& p, const ai3::AttentionHead& head, ai3::AttentionMatrix m, T* to,
                                      int rows, int features) {
  constexpr int kPitch = Features + 8, kParts = Features / 8;
  const T* from = head.begin<T>(m);
  const int64_t pitch = p.matrices[m].row;
  if (p.whole) {
    for (int i = threadIdx.x; i < kMost * kParts; i += kThreads) {
      const int row = i / kParts, part = i % kParts * 8;
      const bool is_inside = row < rows && part < features;
      const uint4 words = is_inside ? *reinterpret_cast<const uint4*>(from + row * pitch + part) : uint4{0, 0, 0, 0};
      *reinterpret_cast<uint4*>(to + row * kPitch + part) = words;
    }
    return;
  }
  for (int i = threadIdx.x; i < kMost * Features; i += kThreads) {
    const int row = i / Features, feature = i % Features;
    to[row * kPitch + feature] = row < rows && feature < features ? from[row * pitch + feature] : T{0};
  }
}

template <ai3::Math M, int Features>
__device__ __forceinline__ void attend(const Params& p) {
  using T = typename ai3::ElementOf<M>::type;
  constexpr int kPitch = Features + 8, kKeyTiles = kMost / 8, kTiles = Features / 8;
  __shared__ __align__(16) T queries[kMost * kPitch], keys[kMost * kPitch], values[kMost * kPitch];
  __shared__ int64_t offsets[ai3::kAttentionMatrices];
  const ai3::AttentionHead head(p, blockIdx.x, offsets);
  stage<T, Features>(p, head, ai3::kQuery, queries, p.queries, p.depth);
  stage<T, Features>(p, head, ai3::kKey, keys, p.keys, p.depth);
  stage<T, Features>(p, head, ai3::kValue, values, p.keys, p.width);
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

  ai3::AttentionSoftmax<T> softmax(p, head);
  float earlier[2];
  softmax.weigh(scores, first, 0, earlier);

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

  const float inverse[2] = {softmax.inverse(0), softmax.inverse(1)};
  T* to = const_cast<T*>(head.begin<T>(ai3::kOutput));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first + lane / 4 + half * 8;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int column = j * 8 + lane % 4 * 2;
      if (query >= p.queries || column >= p.width) continue;
      const uint32_t pair = ai3::narrow_pair<T>(out[j][half * 2] * inverse[half], out[j][half * 2 + 1] * inverse[half]);
      T* at = to + query * p.matrices[ai3::kOutput].row + column;
      if (p.parts) {
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
AI3_KERNEL_BLOCKS(kThreads, 3, attend_32_tf32, Params) { ai3::attend_tf32<32>(p); }
AI3_KERNEL_BLOCKS(kThreads, 3, attend_64_tf32, Params) { ai3::attend_tf32<64>(p); }

#else

namespace {

using ai3::AttentionMatrices, ai3::AttentionParams, ai3::kAttentionKeys, ai3::kAttentionLeading, ai3::kAttentionQueries;

static_assert(kAttentionLeading == AI3_MAX_DIMS - 2);
constexpr int kFeatures = 64;

const char* supports(const ai3_args* a) {
  const bool is_float = a->dtype == AI3_FLOAT32;
  if (is_float ? !a->allow_tf32 : a->dtype != AI3_FLOAT16 && a->dtype != AI3_BFLOAT16) {
    return "needs float16, bfloat16, or float32 whose products may be rounded to TF32";
  }
  const int last = a->output.ndim - 1;
  const int64_t keys = a->key.size[last - 1], depth = a->input.size[last];
  if (keys == 0 || depth == 0) return "needs at least one key of one feature";
  if (depth > kFeatures || a->output.size[last] > kFeatures) return "has more than 64 features";
  if (!is_float && (a->output.size[last - 1] > kAttentionQueries || keys > kAttentionKeys)) {
    return "has more than 64 queries or keys of halves";
  }
  return nullptr;
}

AttentionMatrices matrices(const ai3_tensor& t) {
  AttentionMatrices m{t.data, {}, 0};
  if (t.ndim == 0) return m;
  m.row = t.stride[t.ndim - 2];
  for (int d = 0; d < t.ndim - 2; ++d) m.stride[d] = t.stride[t.ndim - 3 - d];
  return m;
}

void run(const ai3_args* a) {
  const int last = a->output.ndim - 1;
  AttentionParams p{{matrices(a->input), matrices(a->key), matrices(a->value), matrices(a->score_bias),
                     matrices(a->score_mask), matrices(a->output)},
                    {},
                    float(a->scale)};
  int64_t heads = 1;
  for (int d = 0; d < kAttentionLeading; ++d) {
    p.size[d] = d < last - 1 ? int(a->output.size[last - 2 - d]) : 1;
    heads *= p.size[d];
  }
  p.queries = int(a->output.size[last - 1]), p.keys = int(a->key.size[last - 1]);
  p.depth = int(a->input.size[last]), p.width = int(a->output.size[last]);
  p.query_tiles = (p.queries + kAttentionQueries - 1) / kAttentionQueries;
  p.is_causal = a->is_causal, p.masked_is_zero = a->masked_is_zero;
  const bool is_float = a->dtype == AI3_FLOAT32;
  const int64_t size = is_float ? 4 : 2, read = 16 / size, written = is_float ? 4 : 2;
  const auto divides = [&](ai3::AttentionMatrix which, int64_t elements) {
    const AttentionMatrices& m = p.matrices[which];
    bool all = reinterpret_cast<uintptr_t>(m.data) % size_t(elements * size) == 0 && m.row % elements == 0;
    for (int d = 0; d < kAttentionLeading; ++d) all = all && (p.size[d] == 1 || m.stride[d] % elements == 0);
    return all;
  };
  p.whole = p.depth % read == 0 && p.width % read == 0 && divides(ai3::kQuery, read) && divides(ai3::kKey, read) &&
            divides(ai3::kValue, read);
  p.parts = p.width % written == 0 && divides(ai3::kOutput, written);
  const std::string features = std::max(p.depth, p.width) <= 32 ? "attend_32" : "attend_64";
  const std::string name = is_float ? features + "_tf32" : ai3::dtype_name(features.c_str(), a->dtype);
  ai3::cuda::launch(a, name.c_str(), {heads * p.query_tiles}, ai3::kAttentionThreads, 0, p);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "attention",
                           .algorithm = "direct",
                           .version = 2,
                           .flags = 0,
                           .supports = supports,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }

#endif
