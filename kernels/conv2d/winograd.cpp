// Winograd's minimal filtering F(4x4, 3x3), F(2x2, 3x3) where its smaller weights or tiles pay, F(2x2, 5x5), and in one
// dimension F(4, 3) and F(2, 7).
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv 1509.09308.
#include "ai3/winograd_conv.h"
#include "ai3/winograd_line.h"

namespace {

using ai3::ceil_div;
using ai3::WinogradLine;
using ai3::WinogradSquare;

// F(4, 7) would take less time, but has twice the error of F(4x4, 3x3).
using Line3 = WinogradLine<4, 3>;
using Line7 = WinogradLine<2, 7>;
using Square5 = WinogradSquare<2, 5>;

const char* supports(const ai3_args* a) {
  if (!WinogradSquare<4>::fits(a) && !Square5::fits(a) && !Line3::fits(a) && !Line7::fits(a))
    return "needs a 3x3, 5x5, 1x3, 3x1, 1x7 or 7x1 kernel";
  return ai3::winograd_supports(a);
}

// Outputs along a side. For 3x3 the faster of F(4x4) and F(2x2) for one image, as the packed weights should not depend
// on the batch. F(4x4) computes less but has 36 / 16 the weights, which it must read even for few tiles.
int64_t tile_size(const ai3_args* a) {
  if (Line3::fits(a)) return Line3::kOutputs;
  if (Line7::fits(a)) return Line7::kOutputs;
  if (Square5::fits(a)) return Square5::kOutputs;
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

template <typename Use>
void with_tile(const ai3_args* a, Use use) {
  if (Line3::fits(a)) return use(Line3{});
  if (Line7::fits(a)) return use(Line7{});
  if (Square5::fits(a)) return use(Square5{});
  if (tile_size(a) == 4) return use(WinogradSquare<4>{});
  use(WinogradSquare<2>{});
}

void pack(const ai3_args* a, void* dst) {
  with_tile(a, [=](auto tile) { ai3::winograd_pack<decltype(tile)>(a, dst); });
}

void run(const ai3_args* a) {
  with_tile(a, [=](auto tile) { ai3::winograd_run<decltype(tile)>(a); });
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "winograd",
                           .version = 1,
                           .flags = AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_OUTPUT | AI3_RESIDUAL_IN_PLACE,
                           .supports = supports,
                           .cost = cost,
                           .workspace_bytes = workspace_bytes,
                           .packed_bytes = packed_bytes,
                           .pack = pack,
                           .pack_variant = tile_size,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
