// ai3's pools: what the dispatcher calls them with, checked, and the sizes of what they give.
#include <utility>

#include "core.h"

namespace ai3 {
namespace {

// As ATen's pooling_output_shape: with ceil_mode the last window must start inside the input or the left padding.
int64_t pool_extent(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, bool ceil_mode) {
  const int64_t span = in + 2 * pad - dilation * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  int64_t out = (span >= 0 ? span / stride : -((-span + stride - 1) / stride)) + 1;
  if (ceil_mode && (out - 1) * stride >= in + pad) --out;
  return out;
}

ai3_args pool_window(const char* op, const Tensor& input, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                     int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w,
                     bool ceil_mode) {
  check_image(op, input);
  AI3_CHECK(kernel_h > 0 && kernel_w > 0 && stride_h > 0 && stride_w > 0 && dilation_h > 0 && dilation_w > 0, op,
            ": kernel, stride and dilation must be positive");
  AI3_CHECK(pad_h >= 0 && pad_w >= 0 && pad_h <= ((kernel_h - 1) * dilation_h + 1) / 2 &&
                pad_w <= ((kernel_w - 1) * dilation_w + 1) / 2,
            op, ": padding must be at most half the window");
  ai3_args args{};
  args.kernel_h = kernel_h;
  args.kernel_w = kernel_w;
  args.stride_h = stride_h;
  args.stride_w = stride_w;
  args.dilation_h = dilation_h;
  args.dilation_w = dilation_w;
  args.pad_top = args.pad_bottom = pad_h;
  args.pad_left = args.pad_right = pad_w;
  args.groups = 1;
  args.ceil_mode = ceil_mode;
  return args;
}

// The output's height and width.
std::pair<int64_t, int64_t> pool_extents(const char* op, const ai3_args& args, const Tensor& input) {
  const int64_t out_h =
      pool_extent(height_of(input), args.kernel_h, args.stride_h, args.pad_top, args.dilation_h, args.ceil_mode != 0);
  const int64_t out_w =
      pool_extent(width_of(input), args.kernel_w, args.stride_w, args.pad_left, args.dilation_w, args.ceil_mode != 0);
  AI3_CHECK(out_h > 0 && out_w > 0, op, ": the window is larger than the padded input");
  return {out_h, out_w};
}

Tensor run_pool(const char* op, const ai3_args& args, const Tensor& input, int64_t algorithm, bool channels_last) {
  const auto [out_h, out_w] = pool_extents(op, args, input);
  return run_image(algorithm, args, input, channels_of(input), out_h, out_w, channels_last, nullptr, std::nullopt);
}

void run_pool_into(const char* op, const ai3_args& args, const Tensor& input, int64_t algorithm, const Tensor& output,
                   int64_t channel) {
  const auto [out_h, out_w] = pool_extents(op, args, input);
  run_image_into(op, algorithm, args, input, output, channel, channels_of(input), out_h, out_w, nullptr);
}

ai3_args avg_pool_window(const char* op, const Tensor& input, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                         int64_t stride_w, int64_t pad_h, int64_t pad_w, bool ceil_mode, bool count_include_pad,
                         int64_t divisor_override) {
  ai3_args args = pool_window(op, input, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, 1, 1, ceil_mode);
  args.count_include_pad = count_include_pad;
  args.divisor_override = divisor_override;
  return args;
}

}  // namespace

Tensor max_pool2d(const Tensor& input, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                  int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, bool ceil_mode,
                  int64_t algorithm, bool channels_last) {
  const char* op = "ai3::max_pool2d";
  const ai3_args args =
      pool_window(op, input, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, ceil_mode);
  return run_pool(op, args, input, algorithm, channels_last);
}

void max_pool2d_into(const Tensor& output, int64_t channel, const Tensor& input, int64_t kernel_h, int64_t kernel_w,
                     int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                     int64_t dilation_w, bool ceil_mode, int64_t algorithm) {
  const char* op = "ai3::max_pool2d_into";
  const ai3_args args =
      pool_window(op, input, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, ceil_mode);
  run_pool_into(op, args, input, algorithm, output, channel);
}

Tensor avg_pool2d(const Tensor& input, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                  int64_t pad_h, int64_t pad_w, bool ceil_mode, bool count_include_pad, int64_t divisor_override,
                  int64_t algorithm, bool channels_last) {
  const char* op = "ai3::avg_pool2d";
  const ai3_args args = avg_pool_window(op, input, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, ceil_mode,
                                        count_include_pad, divisor_override);
  return run_pool(op, args, input, algorithm, channels_last);
}

void avg_pool2d_into(const Tensor& output, int64_t channel, const Tensor& input, int64_t kernel_h, int64_t kernel_w,
                     int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, bool ceil_mode,
                     bool count_include_pad, int64_t divisor_override, int64_t algorithm) {
  const char* op = "ai3::avg_pool2d_into";
  const ai3_args args = avg_pool_window(op, input, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, ceil_mode,
                                        count_include_pad, divisor_override);
  run_pool_into(op, args, input, algorithm, output, channel);
}

Tensor adaptive_avg_pool2d(const Tensor& input, int64_t out_h, int64_t out_w, int64_t algorithm, bool channels_last) {
  const char* op = "ai3::adaptive_avg_pool2d";
  check_image(op, input);
  AI3_CHECK(out_h >= 0 && out_w >= 0, op, ": negative output size");
  AI3_CHECK(height_of(input) > 0 && width_of(input) > 0, op, ": an empty image");
  ai3_args args{};
  args.groups = 1;
  return run_image(algorithm, args, input, channels_of(input), out_h, out_w, channels_last, nullptr, std::nullopt);
}

}  // namespace ai3
