// Implicit GEMM with precomputed indirection: the pixel that each tap reads is looked up in a table made once a shape.
// Source: Dukhan, "The Indirect Convolution Algorithm", arXiv 1907.02129. The table holds pixel numbers within one
// image and not pointers, so that it serves any batch size and any input; -1 marks the padding.
#include <climits>

#include "ai3/conv2d.h"

namespace {

const char* supports(const ai3_args* a) {
  const ai3::ConvSizes s(a);
  if (s.height > 0 && s.width > INT32_MAX / s.height) return "needs an image of fewer than 2^31 pixels";
  return ai3::conv_supports(a);
}

// [tap][output pixel]
size_t plan_bytes(const ai3_args* a) {
  const ai3::ConvSizes s(a);
  return size_t(s.taps * s.pixels) * sizeof(int32_t);
}

void make_plan(const ai3_args* a, void* dst) {
  const ai3::ConvSizes s(a);
  int32_t* plan = static_cast<int32_t*>(dst);
  for (int64_t tap = 0; tap < s.taps; ++tap) {
    const int64_t top = tap / a->kernel_w * a->dilation_h - a->pad_top;
    const int64_t left = tap % a->kernel_w * a->dilation_w - a->pad_left;
    for (int64_t p = 0; p < s.out_height; ++p) {
      for (int64_t q = 0; q < s.out_width; ++q) {
        const int64_t h = top + p * a->stride_h, w = left + q * a->stride_w;
        const bool inside = h >= 0 && h < s.height && w >= 0 && w < s.width;
        *plan++ = inside ? int32_t(h * s.width + w) : -1;
      }
    }
  }
}

struct Indirect : ai3::ConvPointers {
  template <typename T>
  static void lower(const ai3_args* a, const T* zeros, int64_t first, int64_t count, int64_t pitch, void* scratch) {
    assert(a->plan);
    const ai3::ConvSizes s(a);
    const T** table = static_cast<const T**>(scratch);
    for (int64_t done = 0; done < count;) {
      const int64_t image = (first + done) / s.pixels, pixel = (first + done) % s.pixels;
      const int64_t run = std::min(count - done, s.pixels - pixel);
      const T* input = static_cast<const T*>(a->input.data) + image * s.height * s.width * s.channels;
      const int32_t* plan = static_cast<const int32_t*>(a->plan) + pixel;
      for (int64_t tap = 0; tap < s.taps; ++tap, plan += s.pixels) {
        const T** entry = table + tap * pitch + done;
        for (int64_t i = 0; i < run; ++i) entry[i] = plan[i] < 0 ? zeros : input + plan[i] * s.channels;
      }
      done += run;
    }
  }
};

double cost(const ai3_args* a) {
  return ai3::conv_cost(a, 4.0 * double(a->kernel_h * a->kernel_w), a->weight.size[1], 1);
}

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "implicit precomp gemm",
                           .version = 2,
                           .flags = AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_OUTPUT | AI3_RESIDUAL_IN_PLACE,
                           .supports = supports,
                           .cost = cost,
                           .workspace_bytes = ai3::ConvGemm<Indirect>::workspace_bytes,
                           .packed_bytes = ai3::conv_packed_bytes,
                           .pack = ai3::conv_pack,
                           .plan_bytes = plan_bytes,
                           .make_plan = make_plan,
                           .run = ai3::ConvGemm<Indirect>::run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
