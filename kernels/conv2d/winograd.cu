// Winograd's minimal filtering F(4x4, 3x3) and F(2x2, 3x3), its products by tensor cores in float32 accuracy.
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv 1509.09308. Every
// product is split into three of TF32 (winograd_products.cuh) and summed in float32, whatever allow_tf32 says: outputs
// err by about 1.5e-6 of the largest with F(4x4) and 3e-7 with F(2x2), as with float32 products or less.
#include <ai3/winograd_tiles.cuh>

using namespace ai3::winograd;

#ifdef __CUDACC__

#include <ai3/winograd_wgmma.cuh>

namespace {

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

#include <ai3/winograd_plan.cuh>

namespace {

using ai3::cuda::ceil_div;

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
