// Implicit GEMM: the rows of the im2col matrix are read in place, through addresses computed as the blocks come.
// Source: Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", arXiv 1410.0759, brought to channels_last on
// CPUs: each tap of a pixel is one contiguous run of channels, padding is one shared pixel of zeros.
#include "ai3/conv2d.h"

namespace {

struct Implicit : ai3::ConvPointers {
  template <typename T>
  static void lower(const ai3_args* a, const T* zeros, int64_t first, int64_t count, int64_t pitch, void* scratch) {
    const ai3::ConvSizes s(a);
    const T** table = static_cast<const T**>(scratch);
    int64_t image = first / s.pixels, p = first % s.pixels / s.out_width, q = first % s.out_width;
    for (int64_t i = 0; i < count; ++i) {
      const T* input = static_cast<const T*>(a->input.data) + image * s.height * s.width * s.channels;
      const int64_t top = p * a->stride_h - a->pad_top, left = q * a->stride_w - a->pad_left;
      const T** entry = table + i;
      for (int64_t r = 0; r < a->kernel_h; ++r) {
        const int64_t h = top + r * a->dilation_h;
        for (int64_t x = 0; x < a->kernel_w; ++x, entry += pitch) {
          const int64_t w = left + x * a->dilation_w;
          const bool inside = h >= 0 && h < s.height && w >= 0 && w < s.width;
          *entry = inside ? input + (h * s.width + w) * s.channels : zeros;
        }
      }
      if (++q == s.out_width) {
        q = 0;
        if (++p == s.out_height) {
          p = 0;
          ++image;
        }
      }
    }
  }
};

double cost(const ai3_args* a) {
  return ai3::conv_cost(a, 8.0 * double(a->kernel_h * a->kernel_w), a->weight.size[1], 1);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "implicit gemm",
                           .version = 2,
                           .flags = AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_OUTPUT | AI3_RESIDUAL_IN_PLACE,
                           .supports = ai3::conv_supports,
                           .cost = cost,
                           .workspace_bytes = ai3::ConvGemm<Implicit>::workspace_bytes,
                           .packed_bytes = ai3::conv_packed_bytes,
                           .pack = ai3::conv_pack,
                           .run = ai3::ConvGemm<Implicit>::run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
