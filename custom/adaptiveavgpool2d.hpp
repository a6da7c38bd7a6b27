// An average pooling to a given size of the output. Copy this file into the folder that AI3_CUSTOM names and write
// adaptiveavgpool2d_custom: it becomes the algorithm `custom` of adaptiveavgpool2d. docs/your-own-algorithm.md tells
// the rest.
#pragma once

#include <ai3.hpp>

// true: `default` takes this algorithm first, for every adaptiveavgpool2d it can be handed.
const bool DEFAULT_ADAPTIVEAVGPOOL2D = false;

/**
 * Called for float and double. Tensors are contiguous; sizes of the window are in pixels.
 *
 * input: [samples, channels, height, width]. Not to be written to.
 * output_h, output_w: the output's size, always given; output row i is the mean of the input rows from
 *   floor(i * height / output_h) to below ceil((i + 1) * height / output_h), columns likewise.
 *
 * Returns [samples, channels, output_h, output_w], of the input's scalar_type.
 * What it throws (errs::bail, errs::bail_if) is raised in Python.
 */
template <typename dtype>
Tensor adaptiveavgpool2d_custom(Tensor input, const std::optional<uint> output_h, const std::optional<uint> output_w) {
  errs::no_user_def("adaptiveavgpool2d");
}
