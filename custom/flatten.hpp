// Dimensions merged into one. Copy this file into the folder that AI3_CUSTOM names and write
// flatten_custom: it becomes the algorithm `custom` of flatten. docs/your-own-algorithm.md tells the rest.
#pragma once

#include <ai3.hpp>

// true: `default` takes this algorithm first, for every flatten it can be handed.
const bool DEFAULT_FLATTEN = false;

/**
 * Called for float and double. Tensors are contiguous; sizes of the window are in pixels.
 *
 * input: of any shape. It may be written to, and returned with another shape.
 * start_dim, end_dim_orig: the first and the last dimension to merge, -1 is the last of all. Always 0 and -1: the
 *   elements keep their order, and ai3 gives the output its shape.
 *
 * Returns [elements], of the input's scalar_type.
 * What it throws (errs::bail, errs::bail_if) is raised in Python.
 */
template <typename dtype>
Tensor flatten_custom(Tensor input, const uint start_dim, int end_dim_orig) {
  errs::no_user_def("flatten");
}
