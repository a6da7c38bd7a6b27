// Direct flatten: copies a tensor of any strides into a contiguous one, in the logical order of its elements.
// Source: the definition; two dimensions are walked in tiles, so that a channels_last input is a blocked transposition.
#include <algorithm>
#include <cassert>
#include <cstring>

#include "ai3/kernel.h"

namespace {

constexpr int64_t kTile = 32, kBlock = 16384;  // a tile's side; elements a thread takes at least

// The copy as outer dimensions over a matrix of rows x columns. Columns are the innermost dimension; rows are the one
// with the smallest stride in the input of the others.
struct Copy {
  const ai3_args* args;
  int32_t outer_dims;
  int64_t outer_size[AI3_MAX_DIMS], outer_in[AI3_MAX_DIMS], outer_out[AI3_MAX_DIMS];
  int64_t rows, row_in, row_out, columns, column_in;
  int64_t row_blocks, block_rows;  // a matrix is shared out in blocks of rows
};

Copy plan(const ai3_args* args) {
  int64_t size[AI3_MAX_DIMS + 1], in[AI3_MAX_DIMS + 1], out[AI3_MAX_DIMS + 1];
  int32_t dims = 0;
  int64_t stride = 1;
  // From the innermost dimension outwards, merged where the input is contiguous.
  for (int32_t d = args->input.ndim - 1; d >= 0; --d) {
    const int64_t n = args->input.size[d];
    if (n != 1) {
      if (dims && args->input.stride[d] == in[dims - 1] * size[dims - 1]) {
        size[dims - 1] *= n;
      } else {
        size[dims] = n, in[dims] = args->input.stride[d], out[dims] = stride, ++dims;
      }
    }
    stride *= n;
  }
  for (; dims < 2; ++dims) size[dims] = 1, in[dims] = stride, out[dims] = stride;
  const int64_t rows = std::min_element(in + 1, in + dims) - in;
  Copy copy{args, 0, {}, {}, {}, size[rows], in[rows], out[rows], size[0], in[0], 0, 0};
  for (int32_t d = 1; d < dims; ++d) {
    if (d == rows) continue;
    copy.outer_size[copy.outer_dims] = size[d], copy.outer_in[copy.outer_dims] = in[d];
    copy.outer_out[copy.outer_dims++] = out[d];
  }
  copy.block_rows = std::max(kTile, kBlock / copy.columns);
  copy.row_blocks = (copy.rows + copy.block_rows - 1) / copy.block_rows;
  return copy;
}

template <typename T>
void copy_matrix(const Copy& copy, const T* in, T* out, int64_t rows) {
  if (copy.column_in == 1) {
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(out + i * copy.row_out, in + i * copy.row_in, size_t(copy.columns) * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < rows; i += kTile) {
    const int64_t i_end = std::min(rows, i + kTile);
    for (int64_t j = 0; j < copy.columns; j += kTile) {
      const int64_t j_end = std::min(copy.columns, j + kTile);
      for (int64_t row = i; row < i_end; ++row)
        for (int64_t column = j; column < j_end; ++column)
          out[row * copy.row_out + column] = in[row * copy.row_in + column * copy.column_in];
    }
  }
}

template <typename T>
void flatten_range(void* arg, int64_t begin, int64_t end) {
  const Copy& copy = *static_cast<const Copy*>(arg);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item % copy.row_blocks * copy.block_rows;
    const T* in = static_cast<const T*>(copy.args->input.data) + row * copy.row_in;
    T* out = static_cast<T*>(copy.args->output.data) + row * copy.row_out;
    int64_t rest = item / copy.row_blocks;
    for (int32_t d = 0; d < copy.outer_dims; ++d) {
      in += rest % copy.outer_size[d] * copy.outer_in[d];
      out += rest % copy.outer_size[d] * copy.outer_out[d];
      rest /= copy.outer_size[d];
    }
    copy_matrix(copy, in, out, std::min(copy.block_rows, copy.rows - row));
  }
}

const char* supports(const ai3_args* args) {
  return args->dtype == AI3_FLOAT32 || args->dtype == AI3_FLOAT64 ? nullptr : "needs float32 or float64";
}

double cost(const ai3_args* args) {
  return double(args->output.size[0]) * 2 * (args->dtype == AI3_FLOAT64 ? 8 : 4) / 20;
}

void run(const ai3_args* args) {
  assert(args->input.ndim <= AI3_MAX_DIMS && args->output.ndim == 1 && args->output.size[0] > 0);
  assert(args->input.data && args->output.data && args->runtime && !supports(args));
  Copy copy = plan(args);
  int64_t count = copy.row_blocks;
  for (int32_t d = 0; d < copy.outer_dims; ++d) count *= copy.outer_size[d];
  args->runtime->parallel_for(count, args->dtype == AI3_FLOAT64 ? flatten_range<double> : flatten_range<float>, &copy);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "flatten",
                           .algorithm = "direct",
                           .version = 1,
                           .flags = 0,
                           .supports = supports,
                           .cost = cost,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
