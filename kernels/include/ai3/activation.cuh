// The activations of ai3_activation on a GPU, of float or double: what activation.h is on the CPU.
#pragma once

namespace ai3 {

enum : int {
  kIdentity = 0,
  kRelu = 1,
  kRelu6 = 2,
  kHardswish = 3,
  kHardsigmoid = 4,
  kSigmoid = 5,
  kSilu = 6,
  kGelu = 7,
  kGeluTanh = 8,
};

// A NaN stays one, as in PyTorch: a comparison with it is false.
template <typename T>
__device__ __forceinline__ T clamp(T x, T low, T high) {
  const T raised = x < low ? low : x;
  return raised > high ? high : raised;
}

template <typename T>
__device__ __forceinline__ T sigmoid(T x) {
  return T(1) / (T(1) + exp(-x));
}

// x times the normal distribution's, to 4e-7: erfc by a polynomial in 1 / (1 + p |x|).
// Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
__device__ __forceinline__ float short_gelu(float x) {
  const float size = clamp(fabsf(x), 0.0f, 20.0f), z = size * 0.70710678f;
  float t;
  asm("rcp.approx.f32 %0, %1;" : "=f"(t) : "f"(1.0f + 0.3275911f * z));
  const float series =
      t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float tail = 0.5f * size * series * __expf(-z * z);  // what the distribution leaves behind |x|
  return (x > 0.0f ? x : 0.0f) - tail;
}

template <typename T>
__device__ __forceinline__ T activate(T x, int activation) {
  switch (activation) {
    case kRelu:
      return x < T(0) ? T(0) : x;
    case kRelu6:
      return clamp(x, T(0), T(6));
    case kHardswish:
      return x * clamp(x + T(3), T(0), T(6)) * T(1.0 / 6);
    case kHardsigmoid:
      return clamp(x + T(3), T(0), T(6)) * T(1.0 / 6);
    case kSigmoid:
      return sigmoid(x);
    case kSilu:
      return x / (T(1) + exp(-x));
    case kGelu:
      return T(0.5) * x * (T(1) + erf(x * T(0.70710678118654752440)));
    case kGeluTanh:
      return T(0.5) * x * (T(1) + tanh(T(0.79788456080286535588) * (x + T(0.044715) * x * x * x)));
    default:
      return x;
  }
}

}  // namespace ai3
