// max(x, 0), element by element. Copy this file into the folder that AI3_CUSTOM names and write
// relu_custom: it becomes the algorithm `custom` of relu. docs/your-own-algorithm.md tells the rest.
#pragma once

#include <ai3.hpp>

// true: `default` takes this algorithm first, for every relu it can be handed.
const bool DEFAULT_RELU = false;

/**
 * Called for float and double. Tensors are contiguous; sizes of the window are in pixels.
 *
 * input: [elements], whatever the shape of the layer's input. It may be written to, and returned.
 *
 * Returns [elements], of the input's scalar_type.
 * What it throws (errs::bail, errs::bail_if) is raised in Python.
 */
template <typename dtype>
Tensor relu_custom(Tensor input) {
  errs::no_user_def("relu");
}
