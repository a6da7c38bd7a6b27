// Adds a residual and applies an activation, in place, behind an algorithm that does neither.
#include <ai3/cuda.h>

struct Epilogue {
  void* out;
  const void* residual;  // null without one
  int64_t columns, out_stride, residual_stride, count;
  int is_flat, activation;  // flat: dense, on addresses that 16 divides
};

#ifdef __CUDACC__

#include <ai3/activation.cuh>
#include <ai3/half.cuh>

namespace {

template <typename T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

template <typename T>
__device__ __forceinline__ T ended(T value, ai3::Accumulator<T> residual, int activation) {
  return ai3::narrow<T>(ai3::activate(ai3::widen(value) + residual, activation));
}

// What lies together, 16 bytes at a time.
template <typename T, typename Activate>
__device__ __forceinline__ void run_flat(const Epilogue& p, const Activate& activate) {
  using P = Pack<T>;
  using S = ai3::Accumulator<T>;
  P* out = static_cast<P*>(p.out);
  const P* residual = static_cast<const P*>(p.residual);
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t packs = p.count / P::kCount;
  for (int64_t i = first; i < packs; i += step) {
    P value = out[i], added{};
    if (residual != nullptr) added = residual[i];
#pragma unroll
    for (int j = 0; j < P::kCount; ++j) {
      value.values[j] = ai3::narrow<T>(activate(S(ai3::widen(value.values[j]) + ai3::widen(added.values[j]))));
    }
    out[i] = value;
  }
  for (int64_t i = packs * P::kCount + first; i < p.count; i += step) {
    T* place = static_cast<T*>(p.out) + i;
    *place = ended(*place, residual != nullptr ? ai3::widen(static_cast<const T*>(p.residual)[i]) : 0, p.activation);
  }
}

template <typename T>
__device__ __forceinline__ void run(const Epilogue& p) {
  using S = ai3::Accumulator<T>;
  if (p.is_flat) {
    // Two bytes do not show the error of the short one.
    if (sizeof(T) == 2 && p.activation == ai3::kGelu) {
      return run_flat<T>(p, [](S x) { return S(ai3::short_gelu(float(x))); });
    }
    return run_flat<T>(p, [&](S x) { return ai3::activate(x, p.activation); });
  }
  T* out = static_cast<T*>(p.out);
  const T* residual = static_cast<const T*>(p.residual);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += step) {
    const int64_t row = i / p.columns, column = i - row * p.columns;
    T& place = out[row * p.out_stride + column];
    place =
        ended(place, residual != nullptr ? ai3::widen(residual[row * p.residual_stride + column]) : 0, p.activation);
  }
}

}  // namespace

AI3_KERNEL(256, epilogue_f32, Epilogue) { run<float>(p); }
AI3_KERNEL(256, epilogue_f64, Epilogue) { run<double>(p); }
AI3_KERNEL(256, epilogue_f16, Epilogue) { run<ai3::Half>(p); }
AI3_KERNEL(256, epilogue_bf16, Epilogue) { run<ai3::BFloat16>(p); }

#else

namespace {

using namespace ai3::cuda;

const char* supports(const ai3_args* args) {
  return args->dtype == AI3_OTHER ? "needs float32, float64, float16 or bfloat16" : nullptr;
}

void run(const ai3_args* args) {
  static const char* const names[] = {"epilogue_f32", "epilogue_f64", "epilogue_f16", "epilogue_bf16"};
  const int64_t columns = args->output.size[1], count = args->output.size[0] * columns;
  const auto address = [](const ai3_tensor& t) { return reinterpret_cast<uintptr_t>(t.data); };
  const bool is_flat = args->output.size[0] == 1 && (address(args->output) | address(args->residual)) % 16 == 0;
  const Epilogue p{
      args->output.data, args->residual.data, columns, args->output.stride[0], args->residual.stride[0], count,
      is_flat,           args->activation};
  constexpr int64_t kThreads = 256, kBlocks = 132 * 8, kBytes = 16;
  const int64_t bytes = args->dtype == AI3_FLOAT64 ? 8 : args->dtype == AI3_FLOAT32 ? 4 : 2;
  const int64_t blocks = ceil_div(count, is_flat ? kThreads * (kBytes / bytes) : kThreads);
  launch(args, names[args->dtype], {blocks < kBlocks ? blocks : kBlocks}, kThreads, 0, p);
}

const ai3_kernel table = [] {
  ai3_kernel k{};
  k.abi_version = AI3_ABI_VERSION;
  k.operation = "epilogue";
  k.algorithm = "direct";
  k.version = 1;
  k.flags = AI3_EPILOGUE;
  k.supports = supports;
  k.run = run;
  return k;
}();

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &table; }

#endif
