// An average pooling over images. Copy this file into the folder that AI3_CUSTOM names and write
// avgpool2d_custom: it becomes the algorithm `custom` of avgpool2d. docs/your-own-algorithm.md tells the rest.
#pragma once

#include <ai3.hpp>

// true: `default` takes this algorithm first, for every avgpool2d it can be handed.
const bool DEFAULT_AVGPOOL2D = false;

/**
 * Called for float and double. Tensors are contiguous; sizes of the window are in pixels.
 *
 * input: [samples, channels, height, width]. Not to be written to.
 * kernel_h, kernel_w: the window.
 * padding_h, padding_w: rows above and below, columns left and right that count as zeros.
 * stride_h, stride_w: how far the window moves for the next output.
 * ceil_mode: whether a last window that is partly outside counts.
 * count_include_pad: whether padding counts in what a window's sum is divided by.
 * divisor_override: what it is divided by instead, or nothing.
 *
 * Returns [samples, channels, output height, output width], output_hw_for_2d() gives the sizes, of the input's
 * scalar_type. What it throws (errs::bail, errs::bail_if) is raised in Python.
 */
template <typename dtype>
Tensor avgpool2d_custom(Tensor input, const uint kernel_h, const uint kernel_w, const uint padding_h,
                        const uint padding_w, const uint stride_h, const uint stride_w, const bool ceil_mode,
                        const bool count_include_pad, const std::optional<int> divisor_override) {
  errs::no_user_def("avgpool2d");
}
