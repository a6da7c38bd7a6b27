// The activations that may end an operation, for vectors (vec.h) and scalars of float and double alike.
// Sources, in single precision: exp by Cody and Waite's reduction with the polynomial of Cephes' expf (Moshier, 1992);
// erfc in the form of Hastings (Abramowitz and Stegun 7.1.26), its polynomial fitted anew to degree 8, which errs by
// 2e-8 of the value. In double precision libm computes both, lane by lane.
#ifndef AI3_ACTIVATION_H
#define AI3_ACTIVATION_H

#include <cmath>

#include "ai3/kernel.h"
#include "ai3/vec.h"

namespace ai3 {

// The elements of a vector or scalar, and the integers of their size.
template <typename V>
struct LanesOf;
template <>
struct LanesOf<float> {
  using type = float;
  using bits = uint32_t;
};
template <>
struct LanesOf<double> {
  using type = double;
};
template <>
struct LanesOf<Vec<float>> {
  using type = float;
  using bits = Vec<uint32_t>;
};
template <>
struct LanesOf<Vec<double>> {
  using type = double;
};
template <typename V>
using Lane = typename LanesOf<V>::type;

template <typename V>
inline V clamp(V value, Lane<V> low, Lane<V> high) {
  value = value < low ? broadcast<V>(low) : value;
  return value > high ? broadcast<V>(high) : value;
}

inline double exponential(double x) { return std::exp(x); }
inline double normal_below(double x) { return std::erfc(x * -0.70710678118654752) / 2; }
inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
inline Vec<double> normal_below(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = normal_below(double(x[i]));
  return x;
}

// Within 1e-7 of the value from -86 on, below which it stays what it is there, as denormals are slow; infinite from
// 88.73 on.
template <typename V>
inline V exponential(V x) {
  using Bits = typename LanesOf<V>::bits;
  constexpr float kShift = 12582912;  // 1.5 * 2^23: what is added to it is rounded to an integer, in its lowest bits
  constexpr uint32_t kShiftBits = 0x4b400000;
  x = clamp<V>(x, -86, 89);
  const V shifted = x * 1.44269504f + kShift, n = shifted - kShift;
  const V r = x - n * 0.693359375f - n * -2.12194440e-4f;
  V p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^(n - 1), as 2^128 is infinite.
  Bits exponent;
  memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent - kShiftBits + 126u) << 23;
  V power;
  memcpy(&power, &exponent, sizeof power);
  return p * power * 2.0f;
}

// The share of a standard normal distribution below x; it errs by at most 4e-7 * max(1, x^2) of it,
// and is 0 or 1 beyond 12.6.
template <typename V>
inline V normal_below(V x) {
  // erfc(|x| / sqrt(2)) / 2 = e^(-x^2 / 2) * t * p(t), for t = 1 / (1 + 0.45 |x| / sqrt(2))
  const V t = 1.0f / ((x < 0.0f ? -x : x) * 0.318198052f + 1.0f);
  V p = -0.0170148481f * t + 0.075748302f;
  p = p * t + -0.105445199f;
  p = p * t + 0.0134925498f;
  p = p * t + 0.0346633717f;
  p = p * t + 0.0367538221f;
  p = p * t + 0.0950966999f;
  p = p * t + 0.112669364f;
  p = p * t + 0.127100512f;
  p = p * t + 0.126935422f;
  const V square = x * x, tail = square > 160.0f ? V{} : exponential(square * -0.5f) * (t * p);
  return x < 0.0f ? tail : 1.0f - tail;
}

// Those that are worth a call.
template <typename V>
__attribute__((noinline)) V activate_by_exponential(V x, ai3_activation activation) {
  using T = Lane<V>;
  switch (activation) {
    case AI3_SIGMOID:
      return T(1) / (T(1) + exponential(-x));
    case AI3_SILU:
      return x / (T(1) + exponential(-x));
    case AI3_GELU:
      return x * normal_below(x);
    case AI3_GELU_TANH:
      // (1 + tanh(u)) / 2 = 1 / (1 + e^-2u), with u = sqrt(2 / pi) * (x + 0.044715 x^3)
      return x / (T(1) + exponential(x * (x * x * T(-0.071354816272600248) + T(-1.5957691216057308))));
    default:
      return x;
  }
}

// In single precision within 2e-7 * max(1, |x|). A NaN stays a NaN; infinities give what PyTorch gives.
template <typename V>
inline V activate(V x, ai3_activation activation) {
  using T = Lane<V>;
  if (activation <= AI3_RELU) return activation == AI3_RELU ? relu(x) : x;
  if (activation == AI3_RELU6) return clamp<V>(x, 0, 6);
  if (activation == AI3_HARDSIGMOID) return clamp<V>(x + T(3), 0, 6) * T(1.0 / 6);
  if (activation == AI3_HARDSWISH) return x * (clamp<V>(x + T(3), 0, 6) * T(1.0 / 6));
  return activate_by_exponential(x, activation);
}

// In place, on rows of elements: for kernels whose sums are all in registers, which activate() between them would
// spill.
template <typename T>
__attribute__((noinline)) void activate_rows(T* out, int64_t rows, int64_t stride, int64_t columns,
                                             ai3_activation activation) {
  for (int64_t m = 0; m < rows; ++m, out += stride) {
    for (int64_t n = 0; n < columns; n += kLanes<T>) {
      const Vec<T> value = load_part<Vec<T>>(out + n, columns - n);
      store_part(out + n, activate(value, activation), columns - n);
    }
  }
}

}  // namespace ai3
#endif
