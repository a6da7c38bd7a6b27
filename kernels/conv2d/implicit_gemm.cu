// Implicit GEMM on tensor cores: the rows of the im2col matrix are read in place; float32 as TF32 or, strictly, 3xTF32.
// Source: Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", arXiv 1410.0759; see ai3/gemm_tile.cuh.
#ifdef __CUDACC__

#include <ai3/gemm_conv_kernels.cuh>
#include <ai3/gemm_few_kernels.cuh>
#include <ai3/gemm_kernels.cuh>

#else

#define AI3_CODE_IN_PARTS
#include <ai3/gemm_few_host.cuh>
#include <cstring>

namespace {

const char* supports(const ai3_args* a) {
  if (a->dtype == AI3_OTHER) return "needs a floating-point type";
  if (a->sm < 80) return "needs compute capability 8.0";
  if (a->has_prologue && a->prologue_activation > AI3_RELU) return "applies no activation but ReLU to its input";
  if (a->groups > 1 && a->weight.size[1] == 1) return "depthwise: direct computes it";
  constexpr int64_t kMost = int64_t(1) << 31;
  const int64_t* in = a->input.size;
  if (a->output.size[0] * a->output.size[2] * a->output.size[3] >= kMost) return "has 2^31 pixels";
  if (in[2] * in[3] * a->input.stride[3] >= kMost) return "has images of 2^31 elements";
  if ((in[2] + in[3] + a->pad_top + a->pad_left) + a->kernel_h * a->dilation_h + a->kernel_w * a->dilation_w >=
      kMost / 4)
    return "has a window or sides of 2^29";
  if (a->weight.size[1] * a->kernel_h * a->kernel_w >= kMost / 2) return "has 2^30 weights for an output";
  return nullptr;
}

// What a call multiplies. Windows that lie side by side, as those of the patches of a vision transformer, are read by
// their rows: the taps of a row are one, of as many times the channels, where 16 bytes can be copied only so.
struct Convolution {
  ai3_args args;
  ai3::GemmShape shape;
  ai3::FewChoice few;

  explicit Convolution(const ai3_args* a) : args(*a), shape(of(args)), few(ai3::choose_few(shape)) {
    const int64_t taps = args.kernel_w, channels = shape.channels, bytes = ai3::gemm_element_bytes(a);
    const bool side_by_side = taps > 1 && args.stride_w == taps && args.dilation_w == 1 && args.groups == 1 &&
                              args.pad_left == 0 && args.pad_right == 0 && args.input.size[3] % taps == 0 &&
                              shape.in_pixel == channels;
    if (few.fits || !side_by_side || a->dtype == AI3_FLOAT64 || channels * bytes % 16 == 0 ||
        channels * taps * bytes % 16 != 0)
      return;
    args.input.size[1] *= taps, args.input.stride[3] *= taps, args.input.size[3] /= taps;
    args.weight.size[1] *= taps;
    args.kernel_w = args.stride_w = 1;
    shape = of(args);
    shape.joined = taps;
  }
  Convolution(const Convolution&) = delete;
  Convolution& operator=(const Convolution&) = delete;

 private:
  static ai3::GemmShape of(const ai3_args& a) {
    const bool has_window = a.kernel_h * a.kernel_w > 1 || a.stride_h * a.stride_w > 1 || a.pad_top || a.pad_left ||
                            a.pad_bottom || a.pad_right;
    return {.args = &a,
            .rows = a.output.size[0] * a.output.size[2] * a.output.size[3],
            .columns = a.weight.size[0] / a.groups,
            .channels = a.weight.size[1],
            .kernel_h = a.kernel_h,
            .kernel_w = a.kernel_w,
            .groups = a.groups,
            .in_pixel = a.input.stride[3],
            .out_pixel = a.output.stride[3],
            .has_window = has_window};
  }
};

double cost(const ai3_args* a) {
  const Convolution c(a);
  return c.few.fits ? ai3::few_cost(c.shape, c.few) : ai3::gemm_cost(c.shape);
}

size_t packed_bytes(const ai3_args* a) {
  const Convolution c(a);
  return c.few.fits ? ai3::few_packed_bytes(c.shape, c.few) : ai3::gemm_packed_bytes(c.shape);
}

void pack(const ai3_args* a, void* dst) {
  const Convolution c(a);
  c.few.fits ? ai3::pack_few(c.shape, c.few, dst) : ai3::gemm_pack(c.shape, dst);
}

int64_t pack_variant(const ai3_args* a) {
  const Convolution c(a);
  return ai3::gemm_pack_variant(a) | int64_t(c.shape.joined > 1) << 1 | ai3::few_variant(c.few) << 2;
}

int32_t pools(const ai3_args* a) {
  if (a->has_residual || a->activation > AI3_RELU6 || a->has_prologue) return 0;
  ai3_args apart = *a;
  apart.pools = 0;
  const Convolution c(a), alone(&apart);
  const ai3::GemmShape& s = c.shape;
  const int64_t bytes = ai3::gemm_element_bytes(a);
  if (c.few.fits || s.channels * bytes % 16 != 0 || !ai3::is_aligned(a->input.data)) return 0;
  const ai3::GemmChoice choice = ai3::choose_gemm(s);
  // A pooling behind starts, reads all pixels and writes a quarter of them.
  constexpr double kStart = 2000, kBytesANanosecond = 2700;
  const double pooling = kStart + 1.25 * double(s.rows * s.columns * s.groups * bytes) / kBytesANanosecond;
  return choice.tile != nullptr && choice.time < ai3::choose_gemm(alone.shape).time + pooling;
}

void run(const ai3_args* a) {
  const Convolution c(a);
  c.few.fits ? ai3::run_few(c.shape, c.few) : ai3::run_gemm(c.shape);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "implicit gemm",
                           .version = 1,
                           .flags = AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_OUTPUT | AI3_STRIDED_INPUT |
                                    AI3_RESIDUAL_IN_PLACE | AI3_PROLOGUE | AI3_PROLOGUE_RELU,
                           .supports = supports,
                           .cost = cost,
                           .packed_bytes = packed_bytes,
                           .pack = pack,
                           .pack_variant = pack_variant,
                           .pools = pools,
                           .run = run};

// One of the tiles that may compute the shape, with the depth in so many shares; no tile where there is none.
ai3::GemmChoice numbered(const ai3::GemmShape& s, int32_t tile, int32_t splits) {
  const ai3::GemmTiles tiles = ai3::gemm_tiles(s);
  if (tile >= tiles.count || splits > ai3::gemm_blocks(s)) return {};
  return ai3::find_choice(s, tiles.first[tile], splits);
}

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }

// For tests, as run(), whatever the model of their time says. Null where there is no such tile, else its name.
extern "C" AI3_EXPORT const char* ai3_run_tile(const ai3_args* a, int32_t tile, int32_t splits) {
  const Convolution c(a);
  const ai3::GemmChoice choice = numbered(c.shape, tile, splits);
  if (choice.tile == nullptr) return nullptr;
  ai3::run_gemm(c.shape, choice);
  return choice.tile->name;
}

// For `python -m bench tiles`: what the model knows of that tile. Its time, in nanoseconds, is by the rates given, or
// by the tile's own for null. Returns 0 where there is no such tile.
struct ai3_tile {
  const char* name;
  const double* rates;
  int32_t rate_count, shared;  // bytes of shared memory, which tell how many tiles are beside each other
  double time;
};
extern "C" AI3_EXPORT int32_t ai3_describe_tile(const ai3_args* a, int32_t tile, int32_t splits, const double* rates,
                                                ai3_tile* described) {
  const Convolution c(a);
  const ai3::GemmChoice choice = numbered(c.shape, tile, splits);
  if (choice.tile == nullptr) return 0;
  const ai3::GemmRates& own = ai3::gemm_rates(a, choice.tile->down > 0);
  constexpr int kCount = sizeof(own) / sizeof(double);
  ai3::GemmRates used = own;
  if (rates != nullptr) std::memcpy(&used, rates, sizeof used);
  *described = {choice.tile->name, &own.start, kCount, choice.shared, ai3::gemm_time(c.shape, choice, used)};
  return 1;
}

#endif
