// Direct product of few rows on tensor cores, which takes as long as its weights take to be read: each once, where it
// lies, by the thread whose fragment it is; the warps of a block share the depth.
// Source: the definition; mma.m16n8k16 and m16n8k8 by the PTX ISA, strict float32 as in ai3/gemm_tile.cuh.
#include <ai3/cuda.h>

namespace {

constexpr int kWarps = 16, kRows = 16, kColumns = 8;  // of a block; of a product of matrices
constexpr int kStepBytes = 128;                       // of a row's depth, from one part of a warp's to its next

struct Params {
  const void *input, *weight, *bias, *residual;
  void* output;
  int64_t rows, columns, depth;
  int32_t activation;
  int32_t whole;  // 16 bytes of input and weight can be read at once
};

}  // namespace

#ifdef __CUDACC__

#include <ai3/activation.cuh>
#include <ai3/mma.cuh>

namespace {

// 16 bytes of a row, zeros behind its end; `inside` is false of rows that there are not.
template <typename T>
__device__ __forceinline__ uint4 read(const Params& p, const void* matrix, int64_t row, int64_t at, bool inside) {
  constexpr int kCount = 16 / sizeof(T);
  if (!inside || at >= p.depth) return {0, 0, 0, 0};
  const auto* from = static_cast<const typename ai3::BitsOf<T>::type*>(matrix) + row * p.depth + at;
  if (p.whole) return *reinterpret_cast<const uint4*>(from);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (at + i < p.depth) words[i * sizeof(T) / 4] |= uint32_t(from[i]) << (i * sizeof(T) % 4 * 8);
  }
  return {words[0], words[1], words[2], words[3]};
}

// The products of 32 bytes of depth. In which order the depth is, is the same for both: a thread's 16 bytes are of
// neighbours, where the instruction has them apart.
template <ai3::Math M>
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (M != ai3::Math::kFloat32) {
    ai3::mma<M>(sums, a, b0, b1);
  } else {
    uint32_t high[4], low[4], high0, high1, low0, low1;
#pragma unroll
    for (int i = 0; i < 4; ++i) ai3::split_tf32(a[i], high[i], low[i]);
    ai3::split_tf32(b0, high0, low0);
    ai3::split_tf32(b1, high1, low1);
    float products[4] = {};
    ai3::mma<M>(products, low, high0, high1);
    ai3::mma<M>(products, high, low0, low1);
    ai3::mma<M>(products, high, high0, high1);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += products[i];
  }
}

template <ai3::Math M, int Groups>
__device__ __forceinline__ void linear(const Params& p) {
  using T = typename ai3::ElementOf<M>::type;
  constexpr int kCount = 16 / sizeof(T), kStep = kStepBytes / sizeof(T);
  __shared__ float4 shared[kWarps][Groups][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = int64_t(blockIdx.y) * kRows, first_column = int64_t(blockIdx.x) * Groups * kColumns;
  const int64_t row = first_row + lane / 4, column = first_column + lane / 4;
#if AI3_WGMMA
  ai3::wait_previous_grid();
#endif

  float sums[Groups][4] = {};
#pragma unroll 2
  for (int64_t start = warp * kStep; start < p.depth; start += kWarps * kStep) {
    const int64_t at = start + lane % 4 * kCount;
    uint4 b[Groups][2], low[2], high[2];  // rows: the first eight, the others
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < Groups; ++i) {
        const int64_t of = column + i * kColumns;
        b[i][half] = read<T>(p, p.weight, of, at + half * 4 * kCount, of < p.columns);
      }
      low[half] = read<T>(p, p.input, row, at + half * 4 * kCount, row < p.rows);
      high[half] = read<T>(p, p.input, row + 8, at + half * 4 * kCount, row + 8 < p.rows);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t first[4] = {low[half].x, high[half].x, low[half].y, high[half].y};
      uint32_t second[4] = {low[half].z, high[half].z, low[half].w, high[half].w};
      if constexpr (M == ai3::Math::kTf32) {
#pragma unroll
        for (int e = 0; e < 4; ++e) first[e] = ai3::rounded_tf32(first[e]), second[e] = ai3::rounded_tf32(second[e]);
      }
#pragma unroll
      for (int i = 0; i < Groups; ++i) {
        uint4 w = b[i][half];
        if constexpr (M == ai3::Math::kTf32) {
          w = {ai3::rounded_tf32(w.x), ai3::rounded_tf32(w.y), ai3::rounded_tf32(w.z), ai3::rounded_tf32(w.w)};
        }
        multiply<M>(sums[i], first, w.x, w.y);
        multiply<M>(sums[i], second, w.z, w.w);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Groups; ++i) shared[warp][i][lane] = {sums[i][0], sums[i][1], sums[i][2], sums[i][3]};
  __syncthreads();
  if (warp >= Groups) return;

  float4 sum = shared[0][warp][lane];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) {
    const float4 other = shared[i][warp][lane];
    sum = {sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w};
  }
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t to_row = row + i / 2 * 8, to = first_column + warp * kColumns + lane % 4 * 2 + i % 2;
    if (to_row >= p.rows || to >= p.columns) continue;
    float value = values[i];
    if (p.bias) value += ai3::widen(static_cast<const T*>(p.bias)[to]);
    if (p.residual) value += ai3::widen(static_cast<const T*>(p.residual)[to_row * p.columns + to]);
    static_cast<T*>(p.output)[to_row * p.columns + to] = ai3::narrow<T>(ai3::activate(value, p.activation));
  }
}

}  // namespace

#define AI3_LINEAR(math_name, math, groups) \
  AI3_KERNEL_BLOCKS(kWarps * 32, 1, linear_##math_name##_##groups, Params) { linear<ai3::Math::math, groups>(p); }
#define AI3_LINEARS(math_name, math) \
  AI3_LINEAR(math_name, math, 1)     \
  AI3_LINEAR(math_name, math, 2)     \
  AI3_LINEAR(math_name, math, 4)
#if AI3_HAS_PART(AI3_PART_FLOAT16)
AI3_LINEARS(float16, kFloat16)
#endif
#if AI3_HAS_PART(AI3_PART_BFLOAT16)
AI3_LINEARS(bfloat16, kBFloat16)
#endif
#if AI3_HAS_PART(AI3_PART_TF32)
AI3_LINEARS(tf32, kTf32)
#endif
#if AI3_HAS_PART(AI3_PART_FLOAT32)
AI3_LINEARS(float32, kFloat32)
#endif

#else

#define AI3_CODE_IN_PARTS
#include <ai3/gemm_host.cuh>

namespace {

int64_t bytes_of(const ai3_args* a) { return a->dtype == AI3_FLOAT32 ? 4 : 2; }

const char* supports(const ai3_args* a) {
  if (a->dtype == AI3_OTHER) return "needs a floating-point type";
  if (a->dtype == AI3_FLOAT64) return "has no products of float64";
  if (a->sm < 80) return "needs compute capability 8.0";
  constexpr int64_t kMost = 64;  // rows: weights are read once for each 16 of them
  return a->input.size[0] <= kMost ? nullptr : "is for at most 64 rows";
}

int64_t blocks_of(const ai3_args* a, int groups) {
  return ai3::cuda::ceil_div(a->weight.size[0], groups * kColumns) * ai3::cuda::ceil_div(a->input.size[0], kRows);
}

// The most columns in a block that leave none of most multiprocessors without one.
int groups_of(const ai3_args* a) {
  constexpr int64_t kEnough = 96;
  int groups = 4;
  while (groups > 1 && blocks_of(a, groups) < kEnough) groups /= 2;
  return groups;
}

// Nanoseconds: of the start, of a step's latency in each warp, and of the weights from memory. On an H100, with weights
// of 2 to 75 MB in halves, and of 3 and 8 MB in TF32, whose factors are rounded first, within 11 % of the times.
double cost(const ai3_args* a) {
  const auto depth = static_cast<double>(a->weight.size[1] * bytes_of(a));
  const double bytes = depth * static_cast<double>(a->weight.size[0] * ai3::cuda::ceil_div(a->input.size[0], kRows));
  const double steps = depth / (kWarps * kStepBytes) * static_cast<double>(blocks_of(a, groups_of(a))) / 132;
  return 3500 + 300 * std::min(steps, 4.0) + bytes / (a->dtype == AI3_FLOAT32 ? 1150 : 2800);
}

void run(const ai3_args* a) {
  const int64_t part = 16 / bytes_of(a);
  const bool whole = a->weight.size[1] % part == 0 && ai3::is_aligned(a->input.data) && ai3::is_aligned(a->weight.data);
  const Params p{a->input.data,    a->weight.data,    a->bias,           a->residual.data, a->output.data,
                 a->input.size[0], a->weight.size[0], a->weight.size[1], a->activation,    whole};
  const int groups = groups_of(a);
  const std::string name = std::string("linear_") + ai3::gemm_math(a) + "_" + std::to_string(groups);
  const ai3::cuda::Grid grid{ai3::cuda::ceil_div(p.columns, groups * kColumns), ai3::cuda::ceil_div(p.rows, kRows)};
  if (a->sm == 90) {
    ai3::launch_gemm(a, name, grid, kWarps * 32, 0, p);
  } else {
    ai3::cuda::launch(a, name.c_str(), grid, kWarps * 32, 0, p);
  }
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "linear",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = AI3_EPILOGUE,
                           .supports = supports,
                           .cost = cost,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }

#endif
