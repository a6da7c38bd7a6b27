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

// The functions of one algorithm, as its table wants them.
template <auto kAlgorithm>
struct Convolution {
  static inline const Support* support = nullptr;
  static constexpr Method kMethod = method_of(kAlgorithm);

  static double cost(const ai3_args* args, const Rates& rates) { return support->cost(args, kMethod.operation, rates); }
  static const char* supports(const ai3_args* args) { return support->supports(args, kMethod); }
  static size_t workspace_bytes(const ai3_args* args) { return support->workspace_bytes(args, kMethod); }
  static int32_t fuses(const ai3_args* args) { return support->fuses(args, kMethod); }
  static void run(const ai3_args* args) { support->run(args, kMethod); }
  static size_t packed_bytes(const ai3_args* args) { return support->packed_bytes(args); }
  static void pack(const ai3_args* args, void* dst) { support->pack(args, dst); }
  static int64_t pack_variant(const ai3_args* args) { return support->pack_variant(args); }
};

}  // namespace ai3::cudnn

// What a table's library exports.
#define AI3_CUDNN_KERNEL(Algorithm, table)                                          \
  extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &(table); } \
  extern "C" AI3_EXPORT void ai3_set_support(const void* support) {                 \
    Algorithm::support = static_cast<const ai3::cudnn::Support*>(support);          \
  }

#endif
