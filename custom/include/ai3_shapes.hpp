// Part of ai3.hpp: indices and sizes.
#pragma once

/// The place of element (i, j, ...) in a contiguous tensor of shape (I, J, ...); I is not needed.
inline uint to_linear(uint i, uint j, uint J) { return i * J + j; }
inline uint to_linear(uint i, uint j, uint k, uint J, uint K) { return to_linear(i, j, J) * K + k; }
inline uint to_linear(uint i, uint j, uint k, uint l, uint J, uint K, uint L) {
  return to_linear(i, j, k, J, K) * L + l;
}
inline uint to_linear(uint i, uint j, uint k, uint l, uint m, uint J, uint K, uint L, uint M) {
  return to_linear(i, j, k, l, J, K, L) * M + m;
}
inline uint to_linear(uint i, uint j, uint k, uint l, uint m, uint n, uint J, uint K, uint L, uint M, uint N) {
  return to_linear(i, j, k, l, m, J, K, L, M) * N + n;
}

/// How far the window can move over the padded input, in pixels; no dilation is a dilation of 1.
inline uint output_hw_for_2d_numerator(const uint input, const uint kernel, const uint padding,
                                       const std::optional<uint> dilation) {
  return input + 2 * padding - dilation.value_or(1) * (kernel - 1) - 1;
}

/// Output height (or width) of a convolution, or of a pool without ceil_mode; all sizes in pixels.
inline uint output_hw_for_2d_no_ceil(const uint input, const uint kernel, const uint padding,
                                     const std::optional<uint> dilation, const uint stride) {
  return output_hw_for_2d_numerator(input, kernel, padding, dilation) / stride + 1;
}

/// The same with ceil_mode, as PyTorch has it: a last window that only the rounding up allows must begin in the input
/// or in the padding before it. `dtype` is not used.
template <typename dtype>
uint output_hw_for_2d(const uint input, const uint kernel, const uint padding, const std::optional<uint> dilation,
                      const uint stride, const bool ceil_mode) {
  const uint below = output_hw_for_2d_no_ceil(input, kernel, padding, dilation, stride);
  const bool rounds = output_hw_for_2d_numerator(input, kernel, padding, dilation) % stride != 0;
  // The window behind the last one begins at below * stride, counted from the padding's start.
  return ceil_mode && rounds && below * stride < input + padding ? below + 1 : below;
}

/// A two-dimensional range of work, total_a x total_b items in groups of each_a x each_b.
struct GroupSplit2D {
  uint each_a;
  uint each_b;
  uint total_a;
  uint total_b;
};

/// Shares out num_a x num_b items to groups of about `total` items, whose sides are in the proportion of num_a to
/// num_b. The totals are rounded up to whole groups.
template <typename dtype>
void proportionate_2d_work_split(uint num_a, uint num_b, uint total, uint* set_each_a, uint* set_each_b,
                                 uint* set_total_a, uint* set_total_b) {
  const dtype scale = std::sqrt(dtype(total) / (dtype(num_a) * dtype(num_b)));
  uint each_a = std::max(uint(dtype(num_a) * scale), 1u);
  uint each_b = std::max(uint(dtype(num_b) * scale), 1u);
  // A side below one item leaves the whole group to the other.
  if (dtype(num_a) * scale < 1) {
    each_b = std::max(total, 1u);
  } else if (dtype(num_b) * scale < 1) {
    each_a = std::max(total, 1u);
  }
  *set_each_a = each_a;
  *set_each_b = each_b;
  *set_total_a = (num_a + each_a - 1) / each_a * each_a;
  *set_total_b = (num_b + each_b - 1) / each_b * each_b;
}
