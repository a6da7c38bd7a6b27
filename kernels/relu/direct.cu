// Direct relu: one pass over contiguous elements, 16 bytes a thread at a time.
// Source: the definition; a NaN stays a NaN, as in PyTorch.
#include <ai3/window.cuh>

namespace {

struct Params {
  const void* in;
  void* out;
  int64_t count, vectors;  // of elements; of 16 bytes, the first of them
};

constexpr int kUnrolled = 2, kThreads = 256;

}  // namespace

#ifdef __CUDACC__

template <typename T>
__device__ __forceinline__ T relu_of(T x) {
  return ai3::widen(x) < 0 ? ai3::narrow<T>(0) : x;
}

template <typename T>
__device__ __forceinline__ void relu(const Params& p) {
  using Vector = ai3::Lanes<T, ai3::kLanes<T>>;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  const auto* in = static_cast<const Vector*>(p.in);
  auto* out = static_cast<Vector*>(p.out);
  Vector x[kUnrolled];
#pragma unroll
  for (int i = 0; i < kUnrolled; ++i) {
    if (thread + i * threads < p.vectors) x[i] = in[thread + i * threads];
  }
#pragma unroll
  for (int i = 0; i < kUnrolled; ++i) {
#pragma unroll
    for (int j = 0; j < ai3::kLanes<T>; ++j) x[i].at[j] = relu_of(x[i].at[j]);
    if (thread + i * threads < p.vectors) out[thread + i * threads] = x[i];
  }
  for (int64_t i = p.vectors * ai3::kLanes<T> + thread; i < p.count; i += threads)
    static_cast<T*>(p.out)[i] = relu_of(static_cast<const T*>(p.in)[i]);
}

#define AI3_RELU(suffix, T) \
  AI3_KERNEL(kThreads, relu_##suffix, Params) { relu<T>(p); }
AI3_FOR_DTYPES(AI3_RELU)

#else

namespace {

const char* supports(const ai3_args* args) {
  return args->dtype == AI3_OTHER ? "needs a floating-point dtype" : nullptr;
}

double cost(const ai3_args* args) {
  return 2000 + static_cast<double>(args->output.size[0] * 2 * ai3::dtype_bytes(args->dtype)) / 4000;
}

void run(const ai3_args* args) {
  const int64_t lanes = ai3::kVectorBytes / ai3::dtype_bytes(args->dtype), count = args->output.size[0];
  const bool aligned = ai3::is_aligned(args->input.data) && ai3::is_aligned(args->output.data);
  const int64_t vectors = aligned ? count / lanes : 0;
  const Params params{args->input.data, args->output.data, count, vectors};
  const int64_t threads = std::max<int64_t>(1, ai3::cuda::ceil_div(vectors == 0 ? count : vectors, kUnrolled));
  ai3::cuda::launch(args, ai3::dtype_name("relu", args->dtype).c_str(), {ai3::cuda::ceil_div(threads, kThreads)},
                    kThreads, 0, params);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "relu",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = 0,
                           .supports = supports,
                           .cost = cost,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }

#endif
