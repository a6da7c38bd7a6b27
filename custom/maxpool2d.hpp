// A max pooling over images. Copy this file into the folder that AI3_CUSTOM names and write
// maxpool2d_custom: it becomes the algorithm `custom` of maxpool2d. docs/your-own-algorithm.md tells the rest.
#pragma once

#include <ai3.hpp>

// true: `default` takes this algorithm first, for every maxpool2d it can be handed.
const bool DEFAULT_MAXPOOL2D = false;

/**
 * Called for float and double. Tensors are contiguous; sizes of the window are in pixels.
 *
 * input: [samples, channels, height, width]. Not to be written to.
 * kernel_h, kernel_w: the window.
 * padding_h, padding_w: rows above and below, columns left and right that count as minus infinity.
 * stride_h, stride_w: how far the window moves for the next output.
 * dilation_h, dilation_w: distance of two neighbours under the window in the input; 1 where they touch.
 * ceil_mode: whether a last window that is partly outside counts.
 *
 * Returns [samples, channels, output height, output width], output_hw_for_2d() gives the sizes, of the input's
 * scalar_type. What it throws (errs::bail, errs::bail_if) is raised in Python.
 */
template <typename dtype>
Tensor maxpool2d_custom(Tensor input, const uint kernel_h, const uint kernel_w, const uint padding_h,
                        const uint padding_w, const uint stride_h, const uint stride_w, const uint dilation_h,
                        const uint dilation_w, const bool ceil_mode) {
  errs::no_user_def("maxpool2d");
}
