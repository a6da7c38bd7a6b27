// Adds a residual and applies an activation, in place, behind an algorithm that does neither.
#include <ai3/cuda.h>

struct Epilogue {
  void* out;
  const void* residual;  // null without one
  int64_t columns, out_stride, residual_stride, count;
  int activation;
};

#ifdef __CUDACC__

#include <ai3/activation.cuh>
#include <ai3/half.cuh>

namespace {

template <typename T>
__device__ __forceinline__ void run(const Epilogue& p) {
  T* out = static_cast<T*>(p.out);
  const T* residual = static_cast<const T*>(p.residual);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  const bool flat = p.columns == p.count;  // no division for what lies together
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += step) {
    const int64_t row = flat ? 0 : i / p.columns, column = flat ? i : i - row * p.columns;
    T& place = out[row * p.out_stride + column];
    auto value = ai3::widen(place);
    if (residual != nullptr) value += ai3::widen(residual[row * p.residual_stride + column]);
    place = ai3::narrow<T>(ai3::activate(value, p.activation));
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
  const Epilogue p{args->output.data,
                   args->residual.data,
                   columns,
                   args->output.stride[0],
                   args->residual.stride[0],
                   count,
                   args->activation};
  constexpr int64_t kThreads = 256, kBlocks = 132 * 16;
  const int64_t blocks = ceil_div(count, kThreads);
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
