// A convolution over images. Copy this file into the folder that AI3_CUSTOM names and write
// conv2d_custom: it becomes the algorithm `custom` of conv2d. docs/your-own-algorithm.md tells the rest.
#pragma once

#include <ai3.hpp>

// true: `default` takes this algorithm first, for every conv2d it can be handed.
const bool DEFAULT_CONV2D = false;

/**
 * Called for float and double. Tensors are contiguous; sizes of the window are in pixels.
 *
 * input: [samples, channels, height, width]. Not to be written to.
 * kernel: the weight, [output channels, channels / groups, kernel height, kernel width].
 * bias: [output channels], or nothing.
 * padding_h, padding_w: rows above and below, columns left and right that count as zeros.
 * stride_h, stride_w: how far the window moves for the next output.
 * dilation_h, dilation_w: distance of two neighbours under the window in the input; 1 where they touch.
 * padding_mode: always PaddingMode::Zeros; ai3 has padded the input where the layer asks for another one.
 * groups: channels are cut into this many groups, and each output channel sees the channels of one.
 *
 * Returns [samples, output channels, output height, output width], output_hw_for_2d() gives the sizes, of the input's
 * scalar_type. What it throws (errs::bail, errs::bail_if) is raised in Python.
 */
template <typename dtype>
Tensor conv2d_custom(Tensor input, const Tensor& kernel, const std::optional<const Tensor>& bias, const uint padding_h,
                     const uint padding_w, const uint stride_h, const uint stride_w, const uint dilation_h,
                     const uint dilation_w, const PaddingMode padding_mode, uint groups) {
  errs::no_user_def("conv2d");
}
