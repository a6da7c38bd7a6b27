// Products of matrices by the cuBLASLt that PyTorch has loaded: the functions needed of it, declared here so that no
// CUDA header is, and one product with bias, residual and activation in its epilogue.
// Source: the cuBLASLt API, https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api; the values are cublasLt.h's.
#ifndef AI3_CUBLASLT_H
#define AI3_CUBLASLT_H

#include <ai3/kernel.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <string>

namespace ai3::cublaslt {

enum : int {
  kComputeFloat32 = 68,
  kComputeFloat64 = 70,
  kComputeTf32 = 77,  // CUBLAS_COMPUTE_32F_FAST_TF32

  kTransposed = 1,

  kDescTransA = 3,
  kDescEpilogue = 7,
  kDescBiasPointer = 8,

  kEpilogueNone = 1,
  kEpilogueRelu = 2,
  kEpilogueBias = 4,
  kEpilogueGelu = 32,  // the approximation by tanh

  kPreferMaxWorkspace = 1,
  kPreferReductions = 3,
  kPreferAlignmentA = 5,  // B, C and D follow
  kReduceInComputeType = 2,
};

struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

using Handle = void*;

struct Api {
  int (*create)(Handle*);
  int (*desc_create)(Handle*, int compute, int scale);
  int (*desc_set)(Handle, int attribute, const void*, size_t);
  int (*layout_create)(Handle*, int type, uint64_t rows, uint64_t columns, int64_t ld);
  int (*preference_create)(Handle*);
  int (*preference_destroy)(Handle);
  int (*preference_set)(Handle, int attribute, const void*, size_t);
  int (*heuristic)(Handle, Handle desc, Handle a, Handle b, Handle c, Handle d, Handle preference, int wanted,
                   Heuristic*, int* found);
  int (*matmul)(Handle, Handle desc, const void* alpha, const void* a, Handle a_layout, const void* b, Handle b_layout,
                const void* beta, const void* c, Handle c_layout, void* d, Handle d_layout, const uint64_t* algorithm,
                void* workspace, size_t bytes, void* stream);
  const char* (*status_name)(int);

  // Null where cuBLASLt cannot be loaded.
  static const Api* get() {
    static const Api api;
    return api.complete_ ? &api : nullptr;
  }

 private:
  bool complete_ = false;

  Api() {
    void* lib = dlopen("libcublasLt.so.13", RTLD_NOW);
    if (lib == nullptr) lib = dlopen("libcublasLt.so.12", RTLD_NOW);
    if (lib == nullptr) return;
    complete_ = true;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(lib, name));
      complete_ = complete_ && function != nullptr;
    };
    find(create, "cublasLtCreate");
    find(desc_create, "cublasLtMatmulDescCreate");
    find(desc_set, "cublasLtMatmulDescSetAttribute");
    find(layout_create, "cublasLtMatrixLayoutCreate");
    find(preference_create, "cublasLtMatmulPreferenceCreate");
    find(preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(matmul, "cublasLtMatmul");
    find(status_name, "cublasLtGetStatusName");
  }
};

// Output [rows][columns] = activation(input [rows][depth] times weight [columns][depth] transposed + bias + residual);
// a row of the input, residual and output is `*_pitch` elements behind the last one, the weight is dense.
struct Product {
  int64_t rows, columns, depth, input_pitch, output_pitch;
};

// By the dtypes of kernel.h: cudaDataType_t, and bytes of an element.
constexpr int kType[] = {0, 1, 2, 14};
constexpr int64_t kBytes[] = {4, 8, 2, 2};

// Its GELU in float64 errs by 1e-10, where its sums are exact to 1e-16.
inline bool fuses(const ai3_args* args) {
  if (args->activation == AI3_GELU_TANH) return args->dtype != AI3_FLOAT64;
  return args->activation == AI3_IDENTITY || args->activation == AI3_RELU;
}

// For products whose depth is shared out: each part of it needs an output of its own.
inline size_t workspace_bytes(const ai3_args* args, const Product& p) {
  constexpr int64_t kMost = 32 << 20, kCounters = 64 << 10, kParts = 16;
  const int64_t sums = p.rows * p.columns * (args->dtype == AI3_FLOAT64 ? 8 : 4);
  const int64_t bytes = sums >= kMost / kParts ? kMost : kCounters + kParts * sums;
  return static_cast<size_t>(args->max_workspace < 0 ? bytes : std::min(bytes, args->max_workspace));
}

// What is asked of cuBLASLt once a shape and thread: a description's bias is the call's, so that threads share none.
struct Plan {
  Handle desc, weight, input, output;
  Heuristic found;
};

class Plans {
 public:
  using Key = std::array<int64_t, 14>;

  // Null, with the reason in `error`, where cuBLASLt has no algorithm.
  const Plan* find(const ai3_args* args, const Product& p, int epilogue, size_t workspace, std::string& error) {
    const auto alignment = [](const void* pointer) {
      const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
      return static_cast<int64_t>(std::min<uintptr_t>(256, at & (~at + 1)));
    };
    const bool adds = args->has_residual != 0;
    const std::array<int64_t, 4> aligned = {alignment(args->weight.data), alignment(args->input.data),
                                            alignment(adds ? args->residual.data : args->output.data),
                                            alignment(args->output.data)};
    const Key key = {args->device,
                     args->dtype,
                     args->allow_tf32,
                     p.rows,
                     p.columns,
                     p.depth,
                     p.input_pitch,
                     p.output_pitch,
                     epilogue + adds * 256,
                     static_cast<int64_t>(workspace),
                     aligned[0],
                     aligned[1],
                     aligned[2],
                     aligned[3]};
    const auto known = plans_.find(key);
    if (known != plans_.end()) return &known->second;
    Plan plan{};
    if (!make(args, p, epilogue, workspace, aligned, plan, error)) return nullptr;
    return &plans_.emplace(key, plan).first->second;
  }

 private:
  std::map<Key, Plan> plans_;

  static bool make(const ai3_args* args, const Product& p, int epilogue, size_t workspace,
                   const std::array<int64_t, 4>& aligned, Plan& plan, std::string& error);
};

// One a device, shared by all threads.
inline Handle handle_of(const ai3_args* args, std::string& error) {
  static std::mutex mutex;
  static auto* handles = new std::map<int, Handle>();
  const std::lock_guard lock(mutex);
  Handle& handle = (*handles)[args->device];
  if (handle == nullptr) {
    if (const int status = Api::get()->create(&handle); status != 0) {
      handle = nullptr;
      error = std::string("cublasLtCreate: ") + Api::get()->status_name(status);
    }
  }
  return handle;
}

inline bool Plans::make(const ai3_args* args, const Product& p, int epilogue, size_t workspace,
                        const std::array<int64_t, 4>& aligned, Plan& plan, std::string& error) {
  const Api& api = *Api::get();
  const auto failed = [&](const char* what, int status) {
    if (status != 0 && error.empty()) error = std::string(what) + ": " + api.status_name(status);
    return status != 0;
  };
  const Handle handle = handle_of(args, error);
  if (handle == nullptr) return false;
  const int type = kType[args->dtype], scale = args->dtype == AI3_FLOAT64 ? 1 : 0;
  const int compute = args->dtype == AI3_FLOAT64                       ? kComputeFloat64
                      : args->dtype == AI3_FLOAT32 && args->allow_tf32 ? kComputeTf32
                                                                       : kComputeFloat32;
  // To cuBLAS, whose matrices have their columns in order, each is transposed, and the output the weight's rows times
  // the input.
  const auto rows = static_cast<uint64_t>(p.rows), columns = static_cast<uint64_t>(p.columns),
             depth = static_cast<uint64_t>(p.depth);
  const int transposed = kTransposed;
  Handle preference = nullptr;
  if (failed("cublasLtMatmulDescCreate", api.desc_create(&plan.desc, compute, scale)) ||
      failed("cublasLtMatrixLayoutCreate", api.layout_create(&plan.weight, type, depth, columns, p.depth)) ||
      failed("cublasLtMatrixLayoutCreate", api.layout_create(&plan.input, type, depth, rows, p.input_pitch)) ||
      failed("cublasLtMatrixLayoutCreate", api.layout_create(&plan.output, type, columns, rows, p.output_pitch)) ||
      failed("cublasLtMatmulPreferenceCreate", api.preference_create(&preference))) {
    return false;
  }
  api.desc_set(plan.desc, kDescTransA, &transposed, sizeof transposed);
  api.desc_set(plan.desc, kDescEpilogue, &epilogue, sizeof epilogue);
  if (args->has_bias) api.desc_set(plan.desc, kDescBiasPointer, &args->bias, sizeof args->bias);
  // Sums of float16 would round, and sums in place be in any order.
  const uint32_t reductions = kReduceInComputeType;
  api.preference_set(preference, kPreferMaxWorkspace, &workspace, sizeof workspace);
  api.preference_set(preference, kPreferReductions, &reductions, sizeof reductions);
  for (int i = 0; i < 4; ++i) {
    const auto bytes = static_cast<uint32_t>(aligned[static_cast<size_t>(i)]);
    api.preference_set(preference, kPreferAlignmentA + i, &bytes, sizeof bytes);
  }
  int found = 0;
  const int status = api.heuristic(handle, plan.desc, plan.weight, plan.input, plan.output, plan.output, preference, 1,
                                   &plan.found, &found);
  api.preference_destroy(preference);
  if (failed("cublasLtMatmulAlgoGetHeuristic", status)) return false;
  if (found > 0 && plan.found.state == 0) return true;
  error = "cuBLASLt has no algorithm for it";
  return false;
}

inline bool multiply(const ai3_args* args, const Product& p, std::string& error) {
  if (Api::get() == nullptr) return error = "cuBLASLt cannot be loaded", false;
  int epilogue = args->has_bias ? kEpilogueBias : 0;
  if (args->activation == AI3_RELU) epilogue |= kEpilogueRelu;
  if (args->activation == AI3_GELU_TANH) epilogue |= kEpilogueGelu;
  if (epilogue == 0) epilogue = kEpilogueNone;
  const size_t workspace = workspace_bytes(args, p);
  thread_local auto* plans = new Plans();  // of handles of cuBLASLt's, which may be gone when a thread ends
  const Plan* plan = plans->find(args, p, epilogue, workspace, error);
  if (plan == nullptr) return false;
  const Api& api = *Api::get();
  if (args->has_bias) api.desc_set(plan->desc, kDescBiasPointer, &args->bias, sizeof args->bias);
  const double one = 1, zero = 0;
  const float one_float = 1, zero_float = 0;
  const bool is_double = args->dtype == AI3_FLOAT64, adds = args->has_residual != 0;
  const void* const alpha = is_double ? static_cast<const void*>(&one) : &one_float;
  const void* const beta = adds ? alpha : is_double ? static_cast<const void*>(&zero) : &zero_float;
  const void* const residual = adds ? args->residual.data : args->output.data;
  const int status = api.matmul(handle_of(args, error), plan->desc, alpha, args->weight.data, plan->weight,
                                args->input.data, plan->input, beta, residual, plan->output, args->output.data,
                                plan->output, plan->found.algorithm, args->workspace, workspace, args->stream);
  if (status != 0) error = std::string("cublasLtMatmul: ") + api.status_name(status);
  return status == 0;
}

inline void run(const ai3_args* args, const Product& p) {
  std::string error;
  if (!multiply(args, p, error)) args->runtime->fail(args->runtime, error.c_str());
}

// Nanoseconds on an H200: the operations at half of its peaks, the bytes at its memory's speed, and the launch.
inline double cost(const ai3_args* args, const Product& p) {
  const double rate = args->dtype == AI3_FLOAT32   ? (args->allow_tf32 ? 200e3 : 40e3)
                      : args->dtype == AI3_FLOAT64 ? 40e3
                                                   : 450e3;
  const auto rows = static_cast<double>(p.rows), columns = static_cast<double>(p.columns),
             depth = static_cast<double>(p.depth);
  const double bytes = (rows * depth + rows * columns + depth * columns) * static_cast<double>(kBytes[args->dtype]);
  // A tile of 128 x 128 is computed whole, and the depth of few tiles is not shared out without loss.
  const double tiles = std::max(66.0, std::max(1.0, rows / 128) * std::max(1.0, columns / 128));
  return 2500 + std::max(2 * tiles * 128 * 128 * depth / rate, bytes / 3500);
}

}  // namespace ai3::cublaslt

#endif
