// A linear layer, input * weight^T + bias. Copy this file into the folder that AI3_CUSTOM names and write
// linear_custom: it becomes the algorithm `custom` of linear. docs/your-own-algorithm.md tells the rest.
#pragma once

#include <ai3.hpp>

// true: `default` takes this algorithm first, for every linear it can be handed.
const bool DEFAULT_LINEAR = false;

/**
 * Called for float and double. Tensors are contiguous; sizes of the window are in pixels.
 *
 * input: [samples, input features]; all dimensions of the layer's input but the last are samples. Not to be written to.
 * weight: [output features, input features].
 * bias: [output features], or nothing.
 *
 * Returns [samples, output features], of the input's scalar_type.
 * What it throws (errs::bail, errs::bail_if) is raised in Python.
 */
template <typename dtype>
Tensor linear_custom(Tensor input, const Tensor& weight, const std::optional<const Tensor>& bias) {
  errs::no_user_def("linear");
}
