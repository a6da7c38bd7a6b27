// Winograd's minimal filtering F(6x6, 3x3): fewer products than F(4x4, 3x3), for more of its rounding error.
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv 1509.09308.
#include "ai3/winograd_conv.h"

namespace {

using Tile = ai3::WinogradSquare<6>;

const char* supports(const ai3_args* a) { return Tile::fits(a) ? ai3::winograd_supports(a) : "needs a 3x3 kernel"; }
size_t workspace_bytes(const ai3_args* a) { return ai3::winograd_workspace_bytes(a, Tile::kOutputs); }
size_t packed_bytes(const ai3_args* a) { return ai3::winograd_packed_bytes(a, Tile::kOutputs); }

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "winograd6",
                           .version = 1,
                           .flags = AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_OUTPUT | AI3_RESIDUAL_IN_PLACE,
                           .supports = supports,
                           .only_by_name = "F(6x6) has 4 times the rounding error of winograd's F(4x4)",
                           .workspace_bytes = workspace_bytes,
                           .packed_bytes = packed_bytes,
                           .pack = ai3::winograd_pack<Tile>,
                           .run = ai3::winograd_run<Tile>};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
