// SMM-Conv: scalar-matrix multiplications accumulated over shifted slices of the copied input, without im2col.
// Source: Ofir and Ben-Artzi, "SMM-Conv: Scalar Matrix Multiplication with Zero Packing for Accelerated Convolution",
// CVPR Workshops 2022, arXiv 2411.15659. Extended to strides, dilation and groups, on copies in shared memory.
#include <ai3/smm.cuh>

#ifdef __CUDACC__

#define AI3_SMM(suffix, T)                                                           \
  AI3_KERNEL_BLOCKS(ai3::kSmmThreads, 2, smm_##suffix, ai3::SmmParams) {             \
    ai3::smm<ai3::kSmmFilterBytes / int(sizeof(ai3::Accumulator<T>)), T>(p);         \
  }                                                                                  \
  AI3_KERNEL_BLOCKS(ai3::kSmmThreads, 3, smm_few_filters_##suffix, ai3::SmmParams) { \
    ai3::smm<ai3::kSmmFewFilters, T>(p);                                             \
  }                                                                                  \
  AI3_KERNEL(ai3::kSmmThreads, smm_pack_##suffix, ai3::SmmPackParams) { ai3::smm_pack<T>(p); }
AI3_FOR_DTYPES(AI3_SMM)

#else

namespace {

using ai3::kSmmPixels;
using ai3::kSmmThreads;
using ai3::cuda::ceil_div;

struct Shape {
  int64_t groups, channels, filters, block, blocks, taps;  // of one group; its filters come in `blocks` blocks
  int64_t tile_rows, tile_columns, row_tiles, column_tiles, pixel_threads, parts;
  int64_t row_phases, column_phases, phase_rows, phase_columns, plane, stage_channels, shared_bytes;

  explicit Shape(const ai3_args* a)
      : groups(std::max<int64_t>(1, a->groups)),
        channels(a->weight.size[1]),
        filters(a->weight.size[0] / groups),
        block(filters > ai3::kSmmFewFilters ? ai3::kSmmFilterBytes / sum_bytes(a) : ai3::kSmmFewFilters),
        blocks(ceil_div(filters, block)),
        taps(a->kernel_h * a->kernel_w) {
    // Tiles that are smaller copy more and take less shared memory.
    constexpr int64_t kBlocks = 264, kLeastPixels = 64;
    for (int64_t most = int64_t{kSmmThreads} * kSmmPixels;; most /= 2) {
      set_tile(a, most);
      const int64_t tiles = a->output.size[0] * row_tiles * column_tiles * groups * blocks;
      if (most <= kLeastPixels || (fits() && tiles >= kBlocks)) return;
    }
  }

  bool fits() const {
    constexpr int64_t kMost = 96 * 1024;
    return shared_bytes <= kMost;
  }

 private:
  static int64_t sum_bytes(const ai3_args* a) { return a->dtype == AI3_FLOAT64 ? 8 : 4; }

  void set_tile(const ai3_args* a, int64_t most) {
    constexpr int64_t kFewShared = 44 * 1024, kStageChannels = 8, kParts = 16;
    const int64_t rows = std::max<int64_t>(1, a->output.size[2]), columns = std::max<int64_t>(1, a->output.size[3]);
    const int64_t reach_h = (a->kernel_h - 1) * a->dilation_h, reach_w = (a->kernel_w - 1) * a->dilation_w;
    column_tiles = ceil_div(columns, std::min(columns, std::max<int64_t>(8, most / 4)));
    tile_columns = ceil_div(columns, column_tiles);
    row_tiles = ceil_div(rows, std::max<int64_t>(1, std::min(rows, most / tile_columns)));
    tile_rows = ceil_div(rows, row_tiles);
    pixel_threads = ceil_div(tile_rows * tile_columns, kSmmPixels);
    row_phases = std::min(a->stride_h, reach_h + 1), column_phases = std::min(a->stride_w, reach_w + 1);
    phase_rows = tile_rows + reach_h / a->stride_h, phase_columns = tile_columns + reach_w / a->stride_w;
    plane = row_phases * phase_rows * column_phases * phase_columns;
    parts = 1;
    while (parts < kParts && parts * 2 <= channels && parts * 2 * pixel_threads <= kSmmThreads) parts *= 2;
    const int64_t each = (plane + taps * block) * sum_bytes(a);
    stage_channels = std::clamp<int64_t>((kFewShared - taps * 4) / each, 1, std::max(kStageChannels, parts));
    stage_channels = std::min(stage_channels, channels);
    shared_bytes =
        std::max(stage_channels * each + taps * 4, parts / 2 * pixel_threads * block * kSmmPixels * sum_bytes(a));
  }
};

const char* supports(const ai3_args* a) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (a->dtype == AI3_OTHER) return "needs a floating-point dtype";
  const auto elements = [](const ai3_tensor& t) { return t.size[0] * t.size[1] * t.size[2] * t.size[3]; };
  if (elements(a->output) >= kLimit) return "needs fewer than 2^31 outputs";
  if (a->weight.size[1] == 0) return "needs input channels";
  return Shape(a).fits() ? nullptr : "needs a window that fits in shared memory";
}

size_t packed_bytes(const ai3_args* a) {
  const Shape s(a);
  return static_cast<size_t>(s.groups * s.blocks * s.block * s.channels * s.taps * ai3::dtype_bytes(a->dtype));
}

void pack(const ai3_args* a, void* dst) {
  const Shape s(a);
  const int64_t count = s.groups * s.blocks * s.block * s.channels * s.taps;
  const ai3::SmmPackParams p{a->weight.data,
                             dst,
                             count,
                             static_cast<int32_t>(s.channels),
                             static_cast<int32_t>(s.filters),
                             static_cast<int32_t>(s.taps),
                             static_cast<int32_t>(s.block),
                             static_cast<int32_t>(s.blocks)};
  ai3::cuda::launch(a, ai3::dtype_name("smm_pack", a->dtype).c_str(), {ceil_div(count, kSmmThreads)}, kSmmThreads, 0,
                    p);
}

void run(const ai3_args* a) {
  const Shape s(a);
  ai3::SmmParams p{};
  p.in = a->input.data, p.weight = a->packed, p.bias = a->bias, p.residual = a->residual.data, p.out = a->output.data;
  p.in_stride = ai3::strides_of(a->input), p.out_stride = ai3::strides_of(a->output);
  p.height = static_cast<int32_t>(a->input.size[2]), p.width = static_cast<int32_t>(a->input.size[3]);
  p.out_height = static_cast<int32_t>(a->output.size[2]), p.out_width = static_cast<int32_t>(a->output.size[3]);
  p.stride_h = static_cast<int32_t>(a->stride_h), p.stride_w = static_cast<int32_t>(a->stride_w);
  p.dilation_h = static_cast<int32_t>(a->dilation_h), p.dilation_w = static_cast<int32_t>(a->dilation_w);
  p.pad_top = static_cast<int32_t>(a->pad_top), p.pad_left = static_cast<int32_t>(a->pad_left);
  p.kernel_w = static_cast<int32_t>(a->kernel_w), p.taps = static_cast<int32_t>(s.taps);
  p.channels = static_cast<int32_t>(s.channels), p.filters = static_cast<int32_t>(s.filters);
  p.activation = a->activation;
  p.tile_rows = static_cast<int32_t>(s.tile_rows), p.tile_columns = static_cast<int32_t>(s.tile_columns);
  p.pixel_threads = static_cast<int32_t>(s.pixel_threads), p.parts = static_cast<int32_t>(s.parts);
  p.phase_rows = static_cast<int32_t>(s.phase_rows), p.phase_columns = static_cast<int32_t>(s.phase_columns);
  p.plane = static_cast<int32_t>(s.plane), p.stage_channels = static_cast<int32_t>(s.stage_channels);
  p.filter_blocks = ai3::divider(s.blocks), p.groups = ai3::divider(s.groups);
  p.column_tiles = ai3::divider(s.column_tiles), p.row_tiles = ai3::divider(s.row_tiles);
  p.by_phase_columns = ai3::divider(s.phase_columns), p.column_phases = ai3::divider(s.column_phases);
  p.by_phase_rows = ai3::divider(s.phase_rows), p.by_tile_columns = ai3::divider(s.tile_columns);
  const char* name = s.block == ai3::kSmmFewFilters ? "smm_few_filters" : "smm";
  const int64_t blocks = a->output.size[0] * s.row_tiles * s.column_tiles * s.groups * s.blocks;
  ai3::cuda::launch(a, ai3::dtype_name(name, a->dtype).c_str(), {blocks}, kSmmThreads,
                    static_cast<unsigned>(s.shared_bytes), p);
}

double cost(const ai3_args* a) {
  constexpr double kRate = 15000, kBlocks = 132;
  const Shape s(a);
  const double blocks =
      static_cast<double>(a->output.size[0]) * static_cast<double>(s.row_tiles * s.column_tiles * s.groups * s.blocks);
  const double tile = static_cast<double>(s.block * kSmmPixels * s.pixel_threads);
  const double flops = 2 * std::max(kBlocks, blocks) * tile * static_cast<double>(s.channels * s.taps);
  return 3000 + flops / kRate * (a->dtype == AI3_FLOAT64 ? 2 : 1);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "smm",
                           .version = 1,
                           .flags = AI3_NCHW | AI3_EPILOGUE,
                           .supports = supports,
                           .cost = cost,
                           .packed_bytes = packed_bytes,
                           .pack = pack,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }

#endif
