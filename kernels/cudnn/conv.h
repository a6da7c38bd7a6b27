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

constexpr Operation operation_of(Forward) { return kForward; }
constexpr Operation operation_of(Choice) { return kForward; }
constexpr Operation operation_of(GradInput) { return kGradInput; }
constexpr Operation operation_of(GradWeight) { return kGradWeight; }

// TFLOP/s that an algorithm reached on an H200, at convolutions of 3x3 that fill it.
struct Rates {
  double strict, tf32, half, float64;
};
// Estimated nanoseconds on an H200: operations at the rate of the dtype, or bytes at that of the memory.
double cost(const ai3_args* args, Operation operation, const Rates& rates);

const char* supports(const ai3_args* args, Forward algorithm);
const char* supports(const ai3_args* args, GradInput algorithm);
const char* supports(const ai3_args* args, GradWeight algorithm);
const char* supports(const ai3_args* args, Choice choice);
size_t workspace_bytes(const ai3_args* args, Forward algorithm);
size_t workspace_bytes(const ai3_args* args, GradInput algorithm);
size_t workspace_bytes(const ai3_args* args, GradWeight algorithm);
size_t workspace_bytes(const ai3_args* args, Choice choice);
int32_t fuses(const ai3_args* args, Choice choice);
void run(const ai3_args* args, Forward algorithm);
void run(const ai3_args* args, GradInput algorithm);
void run(const ai3_args* args, GradWeight algorithm);
void run(const ai3_args* args, Choice choice);

// A channels_last convolution takes its weight in that order too: a copy of it, which is packed_bytes() long.
size_t packed_bytes(const ai3_args* args);
void pack(const ai3_args* args, void* dst);
int64_t pack_variant(const ai3_args* args);

// The functions of one algorithm, as its table wants them.
template <auto kAlgorithm>
struct Convolution {
  static double cost(const ai3_args* args, const Rates& rates) {
    return cudnn::cost(args, operation_of(kAlgorithm), rates);
  }
  static const char* supports(const ai3_args* args) { return cudnn::supports(args, kAlgorithm); }
  static size_t workspace_bytes(const ai3_args* args) { return cudnn::workspace_bytes(args, kAlgorithm); }
  static int32_t fuses(const ai3_args* args) { return cudnn::fuses(args, kAlgorithm); }
  static void run(const ai3_args* args) { cudnn::run(args, kAlgorithm); }
};

}  // namespace ai3::cudnn
#endif
