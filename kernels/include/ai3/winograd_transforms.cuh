// The one-dimensional transforms of Winograd's F(2, 3) and F(4, 3) on a GPU, from the same points as winograd.h:
// 0, +-1 and 0, +-5/8, +-3/2, each with infinity.
#pragma once

namespace ai3 {

template <int M>
struct WinogradTransform;

template <>
struct WinogradTransform<2> {
  static constexpr int kSize = 4;

  // B^T d, in place.
  static __device__ __forceinline__ void input(float* d) {
    const float d1 = d[1];
    d[0] = d[2] - d[0];
    d[3] -= d1;
    d[1] = d[2] + d1;
    d[2] -= d1;
  }

  // A^T m, in the first two.
  static __device__ __forceinline__ void output(float* m) {
    const float difference = m[1] - m[2];
    m[0] += m[1] + m[2];
    m[1] = difference + m[3];
  }

  // G g
  static __device__ __forceinline__ void weights(const double* g, double* u) {
    u[0] = -g[0];
    u[1] = (g[0] + g[1] + g[2]) / 2;
    u[2] = (g[0] - g[1] + g[2]) / 2;
    u[3] = g[2];
  }
};

template <>
struct WinogradTransform<4> {
  static constexpr int kSize = 6;
  static constexpr float kP = 0.625f, kQ = 1.5f, kPP = kP * kP, kQQ = kQ * kQ;

  static __device__ __forceinline__ void input(float* d) {
    const float even_p = d[4] - kQQ * d[2], odd_p = kP * (d[3] - kQQ * d[1]);
    const float even_q = d[4] - kPP * d[2], odd_q = kQ * (d[3] - kPP * d[1]);
    d[0] = d[4] - (kPP + kQQ) * d[2] + kPP * kQQ * d[0];
    d[5] = d[5] - (kPP + kQQ) * d[3] + kPP * kQQ * d[1];
    d[1] = even_p + odd_p;
    d[2] = even_p - odd_p;
    d[3] = even_q + odd_q;
    d[4] = even_q - odd_q;
  }

  static __device__ __forceinline__ void output(float* m) {
    const float sum_p = m[1] + m[2], difference_p = m[1] - m[2];
    const float sum_q = m[3] + m[4], difference_q = m[3] - m[4];
    m[0] += sum_p + sum_q;
    m[1] = kP * difference_p + kQ * difference_q;
    m[2] = kPP * sum_p + kQQ * sum_q;
    m[3] = kP * kPP * difference_p + kQ * kQQ * difference_q + m[5];
  }

  static __device__ __forceinline__ void weights(const double* g, double* u) {
    constexpr double p = kP, q = kQ, pp = kPP, qq = kQQ;
    u[0] = g[0] / (pp * qq);
    u[1] = (g[0] + p * g[1] + pp * g[2]) / (2 * pp * (pp - qq));
    u[2] = (g[0] - p * g[1] + pp * g[2]) / (2 * pp * (pp - qq));
    u[3] = (g[0] + q * g[1] + qq * g[2]) / (2 * qq * (qq - pp));
    u[4] = (g[0] - q * g[1] + qq * g[2]) / (2 * qq * (qq - pp));
    u[5] = g[2];
  }
};

}  // namespace ai3
