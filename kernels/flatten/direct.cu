// Direct flatten: copies a tensor of any strides into a contiguous one; one with a transposed dimension in tiles.
// Source: the definition; the tiles are those of Ruetsch and Micikevicius, "Optimizing Matrix Transpose in CUDA", 2009.
#include <ai3/window.cuh>

namespace {

constexpr int kMaxDims = 8, kThreads = 256, kLine = 32;  // threads that read or write neighbours

// The input's dimensions from the innermost outwards, merged where it is contiguous; sizes and strides in units of what
// a thread copies at once. The output is written in order.
struct Params {
  const void* in;
  void* out;
  ai3::Divider size[kMaxDims];
  int64_t stride[kMaxDims];
  unsigned count, dims;
  // For the tiles: the dimension that is nearly contiguous in the input, its stride in the output, and the tiles'
  // count.
  unsigned row_dim;
  int64_t row_out, outer_out[kMaxDims];
  ai3::Divider column_tiles, row_tiles;
};

}  // namespace

#ifdef __CUDACC__

template <typename T>
__device__ __forceinline__ void copy(const Params& p) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= p.count) return;
  int64_t from = 0;
  unsigned rest = i, at = 0;
#pragma unroll
  for (int d = 0; d < kMaxDims; ++d) {
    if (d < p.dims) {
      rest = p.size[d].divide(rest, at);
      from += at * p.stride[d];
    }
  }
  static_cast<T*>(p.out)[i] = static_cast<const T*>(p.in)[from];
}

// A tile of columns (dimension 0) by rows: read along the rows' dimension, written along the columns.
template <typename T>
__device__ __forceinline__ void transpose(const Params& p) {
  constexpr int kSide = sizeof(T) == 2 ? 2 * kLine : kLine, kLines = kThreads / kLine;
  constexpr int kPitch = kSide + (sizeof(T) == 2 ? 2 : 1);  // keeps a column's elements in different banks
  __shared__ T tile[kSide * kPitch];
  unsigned column_tile, row_tile, at;
  unsigned outer = p.row_tiles.divide(p.column_tiles.divide(blockIdx.x, column_tile), row_tile);
  const T* in = static_cast<const T*>(p.in);
  T* out = static_cast<T*>(p.out);
  int64_t row_in = 0;
#pragma unroll
  for (int d = 1; d < kMaxDims; ++d) {
    if (d == p.row_dim) row_in = p.stride[d];
    if (d < p.dims && d != p.row_dim) {
      outer = p.size[d].divide(outer, at);
      in += at * p.stride[d];
      out += at * p.outer_out[d];
    }
  }
  unsigned rows = 0;
#pragma unroll
  for (int d = 1; d < kMaxDims; ++d) {
    if (d == p.row_dim) rows = p.size[d].divisor;
  }
  const unsigned lane = threadIdx.x % kLine, line = threadIdx.x / kLine;
  const unsigned first_row = row_tile * kSide, first_column = column_tile * kSide, columns = p.size[0].divisor;
#pragma unroll
  for (unsigned j = line; j < kSide; j += kLines) {
#pragma unroll
    for (unsigned i = lane; i < kSide; i += kLine) {
      if (first_row + i < rows && first_column + j < columns)
        tile[j * kPitch + i] = in[(first_row + i) * row_in + (first_column + j) * p.stride[0]];
    }
  }
  __syncthreads();
#pragma unroll
  for (unsigned i = line; i < kSide; i += kLines) {
#pragma unroll
    for (unsigned j = lane; j < kSide; j += kLine) {
      if (first_row + i < rows && first_column + j < columns)
        out[(first_row + i) * p.row_out + first_column + j] = tile[j * kPitch + i];
    }
  }
}

AI3_KERNEL(kThreads, copy_16, Params) { copy<uint4>(p); }
#define AI3_FLATTEN(bytes, T)                                \
  AI3_KERNEL(kThreads, copy_##bytes, Params) { copy<T>(p); } \
  AI3_KERNEL(kThreads, transpose_##bytes, Params) { transpose<T>(p); }
AI3_FLATTEN(2, unsigned short)
AI3_FLATTEN(4, unsigned)
AI3_FLATTEN(8, unsigned long long)

#else

namespace {

const char* supports(const ai3_args* args) {
  if (args->dtype == AI3_OTHER) return "needs a floating-point dtype";
  return args->output.size[0] < int64_t{1} << 31 ? nullptr : "needs fewer than 2^31 elements";
}

double cost(const ai3_args* args) {
  return 2000 + static_cast<double>(args->output.size[0] * 2 * ai3::dtype_bytes(args->dtype)) / 3000;
}

void run(const ai3_args* args) {
  constexpr int64_t kMinSide = 8;  // of a matrix that is copied in tiles
  int64_t size[kMaxDims] = {}, in[kMaxDims] = {}, out[kMaxDims] = {}, bytes = ai3::dtype_bytes(args->dtype), step = 1;
  int dims = 0;
  for (int d = args->input.ndim - 1; d >= 0; --d) {
    const int64_t n = args->input.size[d], stride = args->input.stride[d];
    if (n == 1) continue;
    if (dims > 0 && stride == in[dims - 1] * size[dims - 1]) {
      size[dims - 1] *= n;
    } else {
      size[dims] = n, in[dims] = stride, out[dims] = step, ++dims;
    }
    step *= n;
  }
  if (dims == 0) size[0] = 1, in[0] = 1, out[0] = 1, dims = 1;
  Params p{args->input.data, args->output.data, {}, {}, 0, 0, 0, 0, {}, {}, {}};
  const int row = dims < 2 ? 0 : static_cast<int>(std::min_element(in + 1, in + dims) - in);
  const bool tiled = row > 0 && in[0] > in[row] && size[0] >= kMinSide && size[row] >= kMinSide;
  if (in[0] == 1) {
    // Units of 16 bytes where all dimensions are whole numbers of them.
    const int64_t lanes = ai3::kVectorBytes / bytes;
    bool whole = size[0] % lanes == 0 && ai3::is_aligned(p.in) && ai3::is_aligned(p.out);
    for (int d = 1; d < dims; ++d) whole = whole && in[d] % lanes == 0;
    if (whole) {
      size[0] /= lanes, bytes = ai3::kVectorBytes;
      for (int d = 1; d < dims; ++d) in[d] /= lanes;
    }
  }
  int64_t count = 1, matrices = 1;
  for (int d = 0; d < dims; ++d) {
    p.size[d] = ai3::divider(size[d]), p.stride[d] = in[d], p.outer_out[d] = out[d];
    count *= size[d];
    if (d != 0 && d != row) matrices *= size[d];
  }
  p.count = static_cast<unsigned>(count), p.dims = static_cast<unsigned>(dims);
  const std::string suffix = std::to_string(bytes);
  if (!tiled) {
    ai3::cuda::launch(args, ("copy_" + suffix).c_str(), {ai3::cuda::ceil_div(count, kThreads)}, kThreads, 0, p);
    return;
  }
  const int64_t side = bytes == 2 ? 2 * kLine : kLine;
  p.row_dim = static_cast<unsigned>(row), p.row_out = out[row];
  p.column_tiles = ai3::divider(ai3::cuda::ceil_div(size[0], side));
  p.row_tiles = ai3::divider(ai3::cuda::ceil_div(size[row], side));
  const int64_t tiles = int64_t{p.column_tiles.divisor} * p.row_tiles.divisor;
  ai3::cuda::launch(args, ("transpose_" + suffix).c_str(), {tiles * matrices}, kThreads, 0, p);
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

#endif
