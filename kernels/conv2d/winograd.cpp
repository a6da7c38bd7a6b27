// Winograd's minimal filtering F(4x4, 3x3), and F(2x2, 3x3) where its smaller weights or tiles pay.
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv 1509.09308.
#include "ai3/winograd_conv.h"

namespace {

using ai3::ceil_div;

// The faster of F(4x4) and F(2x2) for one image, as the packed weights should not depend on the batch. F(4x4) computes
// less but has 36 / 16 the weights, which it must read even for few tiles.
int64_t tile_size(const ai3_args* a) {
  int64_t best = 4;
  double best_time = 0;
  for (const int64_t m : {4, 2}) {
    const double tiles = double(ceil_div(a->output.size[2], m)) * double(ceil_div(a->output.size[3], m));
    const double time = double((m + 2) * (m + 2)) * std::max(2 * tiles / 100, 4.0 / 20);
    if (m == 4 || time < best_time) best = m, best_time = time;
  }
  return best;
}

double cost(const ai3_args* a) {
  const ai3::WinogradShape s = ai3::winograd_shape(a, tile_size(a));
  const double bytes = a->dtype == AI3_FLOAT64 ? 8 : 4, f = double(s.frequencies) * double(a->groups);
  const double channels = double(s.channels), width = double(s.width), tiles = double(s.tiles);
  // A register block of products costs 8 steps to begin and store; the transforms do more than move their elements.
  const double products = 2 * f * tiles * (channels + 8) * width / 80 * bytes / 4;
  // Where a tile's channels end within a vector, each pixel's are first copied to where a whole vector may be read.
  const double copies = s.channels % (ai3::kVectorBytes / int64_t(bytes)) ? 25 * f * tiles : 0;
  return copies + products + f * channels * width * bytes / 20 + f * tiles * (double(s.row) + width) * bytes / 15;
}

size_t workspace_bytes(const ai3_args* a) { return ai3::winograd_workspace_bytes(a, tile_size(a)); }
size_t packed_bytes(const ai3_args* a) { return ai3::winograd_packed_bytes(a, tile_size(a)); }

void pack(const ai3_args* a, void* dst) { (tile_size(a) == 4 ? ai3::winograd_pack<4> : ai3::winograd_pack<2>)(a, dst); }
void run(const ai3_args* a) { (tile_size(a) == 4 ? ai3::winograd_run<4> : ai3::winograd_run<2>)(a); }

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "winograd",
                           .version = 1,
                           .flags = AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_OUTPUT,
                           .supports = ai3::winograd_supports,
                           .cost = cost,
                           .workspace_bytes = workspace_bytes,
                           .packed_bytes = packed_bytes,
                           .pack = pack,
                           .pack_variant = tile_size,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
