// cuDNN's convolutions for the tables of kernels/conv2d*/*.cudnn.cpp, which need no header but this one.
#ifndef AI3_CUDNN_CONV_H
#define AI3_CUDNN_CONV_H

#include <ai3/kernel.h>

#include <cstdint>

namespace ai3::cudnn {

enum Operation : int64_t { kForward, kGradInput, kGradWeight };

// cuDNN's numbers of its named algorithms.
enum class Forward {
  kImplicitGemm,
  kImplicitPrecompGemm,
  kGemm,
  kDirect,
  kFft,
  kFftTiling,
  kWinograd,
  kWinogradNonfused
};
enum class GradInput { kAlgo0, kAlgo1, kFft, kFftTiling, kWinograd, kWinogradNonfused };
enum class GradWeight { kAlgo0, kAlgo1, kFft, kAlgo3, kWinograd, kWinogradNonfused, kFftTiling };
// How a plan of the graph API is chosen.
enum class Choice { kGuess, kAuto };

// One way to compute one operation.
struct Method {
  Operation operation;
  int algorithm;  // cuDNN's number, or with `is_plan` a Choice
  bool is_plan;
};
constexpr Method method_of(Forward algorithm) { return {kForward, static_cast<int>(algorithm), false}; }
constexpr Method method_of(GradInput algorithm) { return {kGradInput, static_cast<int>(algorithm), false}; }
constexpr Method method_of(GradWeight algorithm) { return {kGradWeight, static_cast<int>(algorithm), false}; }
constexpr Method method_of(Choice choice) { return {kForward, static_cast<int>(choice), true}; }

// TFLOP/s that an algorithm reached on an H200, at convolutions of 3x3 that fill it.
struct Rates {
  double strict, tf32, half, float64;
};

// What the support library does for the tables, handed to each of their libraries when it is loaded: a library whose
// symbols all others in the process could see would take the place of theirs.
struct Support {
  // Estimated nanoseconds on an H200: operations at the rate of the dtype, or bytes at that of the memory.
  double (*cost)(const ai3_args* args, Operation operation, const Rates& rates);
  const char* (*supports)(const ai3_args* args, Method method);
  size_t (*workspace_bytes)(const ai3_args* args, Method method);
  int32_t (*fuses)(const ai3_args* args, Method method);
  void (*run)(const ai3_args* args, Method method);
  // A channels_last convolution takes its weight in that order too: a copy of it, which is packed_bytes() long.
  size_t (*packed_bytes)(const ai3_args* args);
  void (*pack)(const ai3_args* args, void* dst);
  int64_t (*pack_variant)(const ai3_args* args);
};

// What one algorithm says of itself.
struct Described {
  const char* name;
  uint32_t flags;
  Rates rates;  // zeros: it has no estimate
  const char* only_by_name = nullptr;
};

template <auto kAlgorithm>
struct Convolution {
  static inline const Support* support = nullptr;
  static inline Rates rates;
  static constexpr Method kMethod = method_of(kAlgorithm);

  static ai3_kernel table(const Described& described) {
    constexpr const char* kOperations[] = {"conv2d", "conv2d.grad_input", "conv2d.grad_weight"};
    rates = described.rates;
    ai3_kernel k{};
    k.abi_version = AI3_ABI_VERSION;
    k.operation = kOperations[kMethod.operation];
    k.algorithm = described.name;
    k.version = 1;
    k.flags = described.flags;
    k.only_by_name = described.only_by_name;
    k.supports = [](const ai3_args* args) { return support->supports(args, kMethod); };
    k.workspace_bytes = [](const ai3_args* args) { return support->workspace_bytes(args, kMethod); };
    k.run = [](const ai3_args* args) { support->run(args, kMethod); };
    if (rates.strict > 0) {
      k.cost = [](const ai3_args* args) { return support->cost(args, kMethod.operation, rates); };
    }
    if (kMethod.is_plan) k.fuses = [](const ai3_args* args) { return support->fuses(args, kMethod); };
    if ((k.flags & AI3_NHWC) != 0 && kMethod.operation != kGradWeight) {  // whose weight is what it computes
      k.packed_bytes = [](const ai3_args* args) { return support->packed_bytes(args); };
      k.pack = [](const ai3_args* args, void* dst) { support->pack(args, dst); };
      k.pack_variant = [](const ai3_args* args) { return support->pack_variant(args); };
    }
    return k;
  }
};

}  // namespace ai3::cudnn

// A library of one table, from a Described.
#define AI3_CUDNN_KERNEL(Algorithm, ...)                                                                        \
  extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) {                                                \
    static const ai3_kernel table = ai3::cudnn::Convolution<ai3::cudnn::Algorithm>::table({__VA_ARGS__});       \
    return &table;                                                                                              \
  }                                                                                                             \
  extern "C" AI3_EXPORT void ai3_set_support(const void* support) {                                             \
    ai3::cudnn::Convolution<ai3::cudnn::Algorithm>::support = static_cast<const ai3::cudnn::Support*>(support); \
  }

#endif
