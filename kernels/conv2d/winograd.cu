// Winograd's minimal filtering F(4x4, 3x3) and F(2x2, 3x3), its products by tensor cores in float32 accuracy.
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv 1509.09308. Every
// product is split into three of TF32 (winograd_products.cuh) and summed in float32, whatever allow_tf32 says: outputs
// err by about 1.5e-6 of the largest with F(4x4) and 3e-7 with F(2x2), as with float32 products or less.
#include "ai3/cuda.h"

namespace {

// Tiles are numbered by images, rows and columns; a launch takes some of them. In blocks of 16 channels, U is
// [frequency][block][width][16] and V is [frequency][block][rows][16]; the products are
// [split][frequency][rows][width].
struct Params {
  const float *input, *weight, *bias, *residual;
  float *output, *u, *v, *products;
  int64_t in_image, in_row, in_pixel, out_image, out_row, out_pixel;
  int channels, filters, height, columns, out_height, out_columns, pad_top, pad_left;
  int tile_rows, tile_columns;  // of an image
  int64_t first_image;
  int first, tiles, rows;  // the first tile, of that image; tiles, and rows of V, which fill up the last block's
  int blocks, width;       // of channels, an even number; filters, filled up to a multiple of 64
  int splits;              // of the channel blocks, whose products the output transform adds up
  int activation;
};

}  // namespace

#ifdef __CUDACC__

#include "ai3/activation.cuh"
#include "ai3/winograd_products.cuh"
#include "ai3/winograd_transforms.cuh"
#include "ai3/winograd_wgmma.cuh"

namespace {

struct Place {
  int64_t image;
  int row, column;  // of the first output
};
template <int M>
__device__ __forceinline__ Place place_of(const Params& p, int tile) {
  const unsigned index = p.first + tile, tiles = p.tile_rows * p.tile_columns, columns = p.tile_columns;
  const unsigned in_image = index % tiles;
  return {p.first_image + index / tiles, static_cast<int>(in_image / columns * M),
          static_cast<int>(in_image % columns * M)};
}

template <int M>
__device__ __forceinline__ void transform_weights(const Params& p) {
  using Transform = ai3::WinogradTransform<M>;
  constexpr int kSize = Transform::kSize;
  const int64_t elements = static_cast<int64_t>(p.blocks) * p.width * 16;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= elements) return;
  const int channel = static_cast<int>(index / (p.width * 16)) * 16 + ai3::channel_of_slot(index % 16);
  const int filter = ai3::column_of_row(static_cast<int>(index / 16 % p.width));
  double half[kSize][3] = {};
  if (channel < p.channels && filter < p.filters) {
    const float* g = p.weight + (static_cast<int64_t>(filter) * p.channels + channel) * 9;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      double column[3], u[kSize];
#pragma unroll
      for (int i = 0; i < 3; ++i) column[i] = g[i * 3 + j];
      Transform::weights(column, u);
#pragma unroll
      for (int i = 0; i < kSize; ++i) half[i][j] = u[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    double u[kSize];
    Transform::weights(half[i], u);
#pragma unroll
    for (int j = 0; j < kSize; ++j) p.u[(i * kSize + j) * elements + index] = static_cast<float>(u[j]);
  }
}

// A thread takes a channel of a tile.
template <int M>
__device__ __forceinline__ void transform_input(const Params& p) {
  using Transform = ai3::WinogradTransform<M>;
  constexpr int kSize = Transform::kSize;
  const unsigned index = blockIdx.x * blockDim.x + threadIdx.x, channels = p.blocks * 16;
  const int tile = index / channels, channel = index % channels;
  if (tile >= p.tiles) return;
  const Place place = place_of<M>(p, tile);
  const int row = place.row - p.pad_top, column = place.column - p.pad_left;
  const float* from = p.input + place.image * p.in_image + row * p.in_row + column * p.in_pixel + channel;
  float d[kSize][kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const bool inside = static_cast<unsigned>(column + j) < static_cast<unsigned>(p.columns) && channel < p.channels;
    float line[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      line[i] = inside && static_cast<unsigned>(row + i) < static_cast<unsigned>(p.height)
                    ? from[i * p.in_row + j * p.in_pixel]
                    : 0;
    }
    Transform::input(line);
#pragma unroll
    for (int i = 0; i < kSize; ++i) d[i][j] = line[i];
  }
  const int64_t plane = static_cast<int64_t>(p.blocks) * p.rows * 16;
  float* to = p.v + (static_cast<int64_t>(channel / 16) * p.rows + tile) * 16 + channel % 16;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    Transform::input(d[i]);
#pragma unroll
    for (int j = 0; j < kSize; ++j) to[(i * kSize + j) * plane] = d[i][j];
  }
}

// A thread takes a filter of a tile. Most activations are calls, and make a kernel slow to fetch: Simple has but relu.
template <int M, bool Simple>
__device__ __forceinline__ void transform_output(const Params& p) {
  using Transform = ai3::WinogradTransform<M>;
  constexpr int kSize = Transform::kSize;
  const unsigned index = blockIdx.x * blockDim.x + threadIdx.x, filters = p.filters;
  const int tile = index / filters, filter = index % filters;
  if (tile >= p.tiles) return;
  const int64_t plane = static_cast<int64_t>(p.rows) * p.width;
  const float* from = p.products + static_cast<int64_t>(tile) * p.width + filter;
  float m[kSize][kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i)
#pragma unroll
    for (int j = 0; j < kSize; ++j) m[i][j] = from[(i * kSize + j) * plane];
  for (int split = 1; split < p.splits; ++split) {
    from += kSize * kSize * plane;
#pragma unroll
    for (int i = 0; i < kSize; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j) m[i][j] += from[(i * kSize + j) * plane];
  }
  float half[M][kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    float line[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) line[i] = m[i][j];
    Transform::output(line);
#pragma unroll
    for (int i = 0; i < M; ++i) half[i][j] = line[i];
  }
  const Place place = place_of<M>(p, tile);
  const int64_t at = place.image * p.out_image + place.row * p.out_row + place.column * p.out_pixel + filter;
  const float bias = p.bias == nullptr ? 0 : p.bias[filter];
#pragma unroll
  for (int i = 0; i < M; ++i) {
    if (place.row + i >= p.out_height) break;
    Transform::output(half[i]);
#pragma unroll
    for (int j = 0; j < M; ++j) {
      if (place.column + j >= p.out_columns) break;
      const int64_t pixel = at + i * p.out_row + j * p.out_pixel;
      const float y = half[i][j] + bias + (p.residual == nullptr ? 0 : p.residual[pixel]);
      p.output[pixel] = Simple ? (p.activation == ai3::kRelu && y < 0 ? 0 : y) : ai3::activate(y, p.activation);
    }
  }
}

// The operands of a block's tile of products.
template <int Rows>
struct Operands {
  const float *a, *b;
  float* c;
  int blocks;
  __device__ __forceinline__ explicit Operands(const Params& p) {
    const int columns = p.width / 64, frequency = blockIdx.y, split = blockIdx.z;
    const int64_t row = static_cast<int64_t>(blockIdx.x / columns) * Rows, column = blockIdx.x % columns * 64;
    const int begin = p.blocks / 2 * split / p.splits * 2, end = p.blocks / 2 * (split + 1) / p.splits * 2;
    const int64_t block = static_cast<int64_t>(frequency) * p.blocks + begin;
    const int64_t plane = static_cast<int64_t>(gridDim.y) * split + frequency;
    a = p.v + (block * p.rows + row) * 16;
    b = p.u + (block * p.width + column) * 16;
    c = p.products + (plane * p.rows + row) * p.width + column;
    blocks = end - begin;
  }
};

template <int Rows, int WarpRows, int WarpColumns, int Stages>
__device__ __forceinline__ void multiply(const Params& p) {
  const Operands<Rows> o(p);
  ai3::multiply_tile<Rows, 64, WarpRows, WarpColumns, Stages>(o.a, 16 * p.rows, o.b, 16 * p.width, o.blocks, o.c,
                                                              p.width);
}

template <int Rows, int Stages>
__device__ __forceinline__ void multiply_wgmma(const Params& p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const Operands<Rows> o(p);
  ai3::multiply_tile_wgmma<Rows, Stages>(o.a, 16 * p.rows, o.b, 16 * p.width, o.blocks, o.c, p.width);
#endif
}

}  // namespace

AI3_KERNEL(128, winograd_weights_2, Params) { transform_weights<2>(p); }
AI3_KERNEL(128, winograd_weights_4, Params) { transform_weights<4>(p); }
AI3_KERNEL(128, winograd_input_2, Params) { transform_input<2>(p); }
AI3_KERNEL(128, winograd_input_4, Params) { transform_input<4>(p); }
AI3_KERNEL(128, winograd_output_2, Params) { transform_output<2, true>(p); }
AI3_KERNEL(128, winograd_output_4, Params) { transform_output<4, true>(p); }
AI3_KERNEL(128, winograd_output_2_activation, Params) { transform_output<2, false>(p); }
AI3_KERNEL(128, winograd_output_4_activation, Params) { transform_output<4, false>(p); }
AI3_KERNEL_BLOCKS(128, 6, winograd_multiply_16, Params) { multiply<16, 16, 16, 8>(p); }
AI3_KERNEL_BLOCKS(128, 4, winograd_multiply_64, Params) { multiply<64, 32, 32, 4>(p); }
AI3_KERNEL_BLOCKS(128, 3, winograd_wgmma_64, Params) { multiply_wgmma<64, 3>(p); }
AI3_KERNEL_BLOCKS(256, 2, winograd_wgmma_128, Params) { multiply_wgmma<128, 3>(p); }

#else
#include <algorithm>

namespace {

using ai3::cuda::ceil_div;

// How the products are computed, with what it was measured to take on an H200 (us).
struct Multiply {
  const char* name;
  int64_t rows;  // of tiles of products, of 64 columns
  unsigned threads, shared;
  double tile, step;    // a tile, and 32 channels of it, where they fill the GPU
  double step_latency;  // 32 channels of a tile, where there are few tiles
};
constexpr Multiply kFew = {"winograd_multiply_16", 16, 128, 8 * 80 * 64, 0.2, 0.26, 0.55};
constexpr Multiply kAny = {"winograd_multiply_64", 64, 128, 4 * 128 * 64, 0.8, 0.45, 0.6};
constexpr Multiply kHopper[] = {{"winograd_wgmma_64", 64, 128, 3 * 2 * 192 * 64, 0.79, 0.33, 0.5},
                                {"winograd_wgmma_128", 128, 256, 3 * 2 * 256 * 64, 1.38, 0.56, 0.6}};

struct Plan {
  int64_t tile;  // outputs along a side
  int64_t tiles, frequencies, blocks, width;
  Multiply multiply;
  int64_t splits;
  int64_t launch, rows;  // tiles of a launch, and rows of its V
  double time;           // us

  int64_t v_elements(int64_t of_rows) const { return frequencies * blocks * 16 * of_rows; }
  int64_t product_elements(int64_t of_rows) const { return splits * frequencies * width * of_rows; }
};

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// By the image alone, so that a weight is packed once for any batch. F(4x4) computes less, but has 36 / 16 the weights
// and fewer tiles, which must be read, and fill the GPU, even for few images.
int64_t tile_of(const ai3_args* a) {
  const auto work = [&](int64_t tile) {
    const int64_t tiles = ceil_div(a->output.size[2], tile) * ceil_div(a->output.size[3], tile);
    return (tile + 2) * (tile + 2) * (tiles + 24);
  };
  return work(2) < work(4) ? 2 : 4;
}

void consider(Plan& best, const Multiply& multiply, int64_t splits) {
  const double launch = 2, blocks = double(ceil_div(best.tiles, multiply.rows) * (best.width / 64)),
               each = double(ceil_div(best.blocks / 2, splits)),
               sm_blocks = double(ceil_div(int64_t(blocks) * best.frequencies * splits, 132)),
               plane = double(best.frequencies * best.tiles) * 4 / 3e6;
  Plan plan = best;
  plan.multiply = multiply;
  plan.splits = splits;
  const double products = std::max({sm_blocks * (multiply.tile + multiply.step * each), multiply.step_latency * each,
                                    double(best.frequencies * best.blocks * 16 * best.width) * 4 / 3e6});
  plan.time =
      3 * launch + products + plane * double(best.blocks) * 16 + (plane * double(best.width) + 1) * double(splits);
  if (best.time == 0 || plan.time < best.time) best = plan;
}

Plan plan_of(const ai3_args* a) {
  Plan plan = {};
  plan.tile = tile_of(a);
  plan.frequencies = (plan.tile + 2) * (plan.tile + 2);
  plan.tiles = a->input.size[0] * ceil_div(a->output.size[2], plan.tile) * ceil_div(a->output.size[3], plan.tile);
  plan.blocks = round_up(std::max<int64_t>(1, a->input.size[1]), 32) / 16;
  plan.width = round_up(std::max<int64_t>(1, a->output.size[1]), 64);
  for (const int64_t splits : {1, 2, 4}) {
    if (plan.blocks / 2 < splits) break;
    if (plan.tiles <= kFew.rows) {
      consider(plan, kFew, splits);
    } else if (a->sm == 90) {
      for (const Multiply& multiply : kHopper) consider(plan, multiply, splits);
    } else {
      consider(plan, kAny, splits);
    }
  }
  // More tiles at once do not pay, but take more memory.
  constexpr int64_t kMaxWorkspace = int64_t{512} << 20;
  const int64_t limit = a->max_workspace < 0 ? kMaxWorkspace : std::min(kMaxWorkspace, a->max_workspace);
  const int64_t row_bytes = (plan.v_elements(1) + plan.product_elements(1)) * 4;
  const int64_t most = std::max<int64_t>(1, limit / row_bytes / plan.multiply.rows) * plan.multiply.rows;
  const int64_t launches = std::max<int64_t>(1, ceil_div(plan.tiles, most));
  plan.rows = round_up(std::max<int64_t>(1, ceil_div(plan.tiles, launches)), plan.multiply.rows);
  plan.launch = plan.rows;
  return plan;
}

const char* supports(const ai3_args* a) {
  if (a->dtype != AI3_FLOAT32) return "needs float32";
  if (a->kernel_h != 3 || a->kernel_w != 3) return "needs a 3x3 kernel";
  if (a->stride_h != 1 || a->stride_w != 1) return "needs a stride of 1";
  if (a->dilation_h != 1 || a->dilation_w != 1) return "needs a dilation of 1";
  if (a->groups != 1) return "needs one group";
  if (a->sm < 80) return "needs TF32 tensor cores (sm_80)";
  return nullptr;
}

double cost(const ai3_args* a) { return plan_of(a).time * 1e3; }

size_t workspace_bytes(const ai3_args* a) {
  const Plan plan = plan_of(a);
  return static_cast<size_t>(plan.v_elements(plan.rows) + plan.product_elements(plan.rows)) * sizeof(float);
}

size_t packed_bytes(const ai3_args* a) {
  const Plan plan = plan_of(a);
  return static_cast<size_t>(plan.frequencies * plan.blocks * plan.width * 16) * sizeof(float);
}

Params params_of(const ai3_args* a, const Plan& plan) {
  Params p = {};
  p.channels = static_cast<int>(a->input.size[1]);
  p.filters = static_cast<int>(a->output.size[1]);
  p.blocks = static_cast<int>(plan.blocks);
  p.width = static_cast<int>(plan.width);
  return p;
}

void pack(const ai3_args* a, void* dst) {
  const Plan plan = plan_of(a);
  Params p = params_of(a, plan);
  p.weight = static_cast<const float*>(a->weight.data);
  p.u = static_cast<float*>(dst);
  const char* name = plan.tile == 4 ? "winograd_weights_4" : "winograd_weights_2";
  ai3::cuda::launch(a, name, {ceil_div(plan.blocks * plan.width * 16, 128)}, 128, 0, p);
}

void run(const ai3_args* a) {
  const Plan plan = plan_of(a);
  Params p = params_of(a, plan);
  p.input = static_cast<const float*>(a->input.data);
  p.bias = static_cast<const float*>(a->bias);
  p.residual = static_cast<const float*>(a->residual.data);
  p.output = static_cast<float*>(a->output.data);
  p.u = static_cast<float*>(const_cast<void*>(a->packed));
  p.v = static_cast<float*>(a->workspace);
  p.products = p.v + plan.v_elements(plan.rows);
  p.in_image = a->input.stride[0], p.in_row = a->input.stride[2], p.in_pixel = a->input.stride[3];
  p.out_image = a->output.stride[0], p.out_row = a->output.stride[2], p.out_pixel = a->output.stride[3];
  p.height = static_cast<int>(a->input.size[2]), p.columns = static_cast<int>(a->input.size[3]);
  p.out_height = static_cast<int>(a->output.size[2]), p.out_columns = static_cast<int>(a->output.size[3]);
  p.pad_top = static_cast<int>(a->pad_top), p.pad_left = static_cast<int>(a->pad_left);
  p.tile_rows = static_cast<int>(ceil_div(a->output.size[2], plan.tile));
  p.tile_columns = static_cast<int>(ceil_div(a->output.size[3], plan.tile));
  p.rows = static_cast<int>(plan.rows);
  p.splits = static_cast<int>(plan.splits);
  p.activation = a->activation;
  const bool simple = a->activation == AI3_IDENTITY || a->activation == AI3_RELU;
  const std::string tile = std::to_string(plan.tile), input = "winograd_input_" + tile,
                    output = "winograd_output_" + tile + (simple ? "" : "_activation");
  const int64_t channels = plan.blocks * 16, filters = a->output.size[1];
  const int64_t image_tiles = int64_t{p.tile_rows} * p.tile_columns;
  for (int64_t first = 0; first < plan.tiles; first += plan.launch) {
    p.first_image = first / image_tiles;
    p.first = static_cast<int>(first % image_tiles);
    p.tiles = static_cast<int>(std::min(plan.launch, plan.tiles - first));
    const int64_t blocks = ceil_div(p.tiles, plan.multiply.rows) * (plan.width / 64);
    if (!ai3::cuda::launch(a, input.c_str(), {ceil_div(p.tiles * channels, 128)}, 128, 0, p)) return;
    if (!ai3::cuda::launch(a, plan.multiply.name, {blocks, plan.frequencies, plan.splits}, plan.multiply.threads,
                           plan.multiply.shared, p))
      return;
    if (!ai3::cuda::launch(a, output.c_str(), {ceil_div(p.tiles * filters, 128)}, 128, 0, p)) return;
  }
}

const ai3_kernel kernel = {
    .abi_version = AI3_ABI_VERSION,
    .operation = "conv2d",
    .algorithm = "winograd",
    .version = 1,
    .flags = AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_INPUT | AI3_STRIDED_OUTPUT | AI3_RESIDUAL_IN_PLACE,
    .supports = supports,
    .cost = cost,
    .workspace_bytes = workspace_bytes,
    .packed_bytes = packed_bytes,
    .pack = pack,
    .pack_variant = tile_of,
    .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
#endif
