// im2col and GEMM: the windows of a block of output pixels are copied to a matrix, which is multiplied by the weight.
// Source: Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006.
// Only as many windows as stay in cache are copied at a time; a 1x1 convolution reads its input in place, or copies it
// through its prologue.
#include <limits>

#include "ai3/conv2d.h"

namespace {

struct Im2col {
  static constexpr int64_t kScratch = 1 << 20;
  static constexpr bool kCheap = false;

  static bool in_place(const ai3_args* a) { return ai3::conv_is_pointwise(a) && !a->has_prologue; }

  static int64_t row_bytes(const ai3_args* a) {
    if (in_place(a)) return 0;
    const ai3::ConvSizes s(a);
    return s.taps * s.channels * s.bytes;
  }

  // The taps of one group are not adjacent where there are several.
  static int64_t segments(const ai3_args* a) { return a->groups == 1 ? 1 : a->kernel_h * a->kernel_w; }

  template <typename T>
  static ai3::StridedRows<T> rows(const ai3_args* a, int64_t first, int64_t, const void* scratch, int64_t group) {
    const ai3::ConvSizes s(a);
    const int64_t row = in_place(a) ? ai3::input_pixel_stride(a) : s.taps * s.channels;
    const T* base = in_place(a) ? static_cast<const T*>(a->input.data) + first * row : static_cast<const T*>(scratch);
    return {base + group * s.group_channels, row, s.channels};
  }

  template <typename T>
  static void copy_through_prologue(const ai3_args* a, const T* from, T* to) {
    using V = ai3::Vec<T>;
    const T* scale = static_cast<const T*>(a->prologue_scale);
    const T* shift = static_cast<const T*>(a->prologue_shift);
    const int64_t channels = a->input.size[1], whole = channels / ai3::kLanes<T> * ai3::kLanes<T>;
    const T least = a->prologue_activation == AI3_RELU ? T(0) : -std::numeric_limits<T>::infinity();
    const auto at_least = [least](V v) { return v < least ? ai3::broadcast<V>(least) : v; };
    for (int64_t c = 0; c < whole; c += ai3::kLanes<T>)
      ai3::store(to + c, at_least(ai3::load<V>(from + c) * ai3::load<V>(scale + c) + ai3::load<V>(shift + c)));
    if (const int64_t left = channels - whole; left > 0) {
      const V x = ai3::load_part<V>(from + whole, left) * ai3::load_part<V>(scale + whole, left);
      ai3::store_part(to + whole, at_least(x + ai3::load_part<V>(shift + whole, left)), left);
    }
    if (a->prologue_activation > AI3_RELU) ai3::activate_rows(to, 1, channels, channels, a->prologue_activation);
  }

  template <typename T>
  static void lower(const ai3_args* a, const T*, int64_t first, int64_t count, int64_t, void* scratch) {
    if (in_place(a)) return;
    const ai3::ConvSizes s(a);
    const int64_t pixel = ai3::input_pixel_stride(a);
    T* to = static_cast<T*>(scratch);
    const auto zero = [&](int64_t pixels) {
      memset(to, 0, size_t(pixels * s.channels) * sizeof(T));
      to += pixels * s.channels;
    };
    const auto copy = [&](const T* from, int64_t pixels) {
      // At once where there is nothing between them.
      const int64_t parts = pixel == s.channels ? std::min<int64_t>(1, pixels) : pixels;
      for (int64_t i = 0; i < parts; ++i, from += pixel, to += pixels / parts * s.channels)
        memcpy(to, from, size_t(pixels / parts * s.channels) * sizeof(T));
    };
    for (int64_t row = first; row < first + count; ++row) {
      const int64_t image = row / s.pixels, p = row % s.pixels / s.out_width, q = row % s.out_width;
      const int64_t top = p * a->stride_h - a->pad_top, left = q * a->stride_w - a->pad_left;
      for (int64_t r = 0; r < a->kernel_h; ++r) {
        const int64_t h = top + r * a->dilation_h;
        if (h < 0 || h >= s.height) {
          zero(a->kernel_w);
          continue;
        }
        const T* line = static_cast<const T*>(a->input.data) + (image * s.height + h) * s.width * pixel;
        if (a->has_prologue) {
          copy_through_prologue(a, line + left * pixel, to);
          to += s.channels;
          continue;
        }
        if (a->dilation_w == 1) {
          const int64_t begin = std::min(std::max<int64_t>(0, -left), a->kernel_w);
          const int64_t end = std::max(begin, std::min(s.width - left, a->kernel_w));
          zero(begin);
          copy(line + (left + begin) * pixel, end - begin);
          zero(a->kernel_w - end);
          continue;
        }
        for (int64_t x = 0; x < a->kernel_w; ++x) {
          const int64_t w = left + x * a->dilation_w;
          if (w < 0 || w >= s.width)
            zero(1);
          else
            copy(line + w * pixel, 1);
        }
      }
    }
  }
};

double cost(const ai3_args* a) {
  const int64_t taps = a->groups == 1 ? a->kernel_h * a->kernel_w : 1;
  return ai3::conv_cost(a, double(Im2col::row_bytes(a)), a->weight.size[1] * taps, 1);
}

const ai3_kernel kernel = {
    .abi_version = AI3_ABI_VERSION,
    .operation = "conv2d",
    .algorithm = "gemm",
    .version = 3,
    .flags = AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_OUTPUT | AI3_RESIDUAL_IN_PLACE | AI3_STRIDED_INPUT | AI3_PROLOGUE,
    .supports = ai3::conv_supports,
    .cost = cost,
    .workspace_bytes = ai3::ConvGemm<Im2col>::workspace_bytes,
    .packed_bytes = ai3::conv_packed_bytes,
    .pack = ai3::conv_pack,
    .run = ai3::ConvGemm<Im2col>::run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
