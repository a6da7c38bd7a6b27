// The gradients of conv2d, which aten::convolution_backward computes together, each an operation with algorithms of its
// own. Nothing is kept of the weight, which changes with every step.
#include <torch/csrc/stable/library.h>

#include "device.h"

namespace ai3 {
namespace {

// Of the convolution: the image's sizes, and [K,C/groups,R,S].
struct Sizes {
  int64_t height, width, filters, group_channels, kernel_h, kernel_w;
};

// The window, where the gradient of the output is what these sizes make.
ai3_args check_window(const char* op, const Tensor& grad, const Sizes& sizes, int64_t stride_h, int64_t stride_w,
                      int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right, int64_t dilation_h,
                      int64_t dilation_w, int64_t groups) {
  AI3_CHECK(grad.dim() == 4, op, ": expected a gradient [N,K,P,Q], got ", grad.dim(), " dimensions");
  AI3_CHECK(groups > 0 && sizes.filters % groups == 0 && grad.size(1) == sizes.filters, op, ": a gradient of ",
            grad.size(1), " channels does not fit ", sizes.filters, " filters in ", groups, " groups");
  AI3_CHECK(sizes.kernel_h > 0 && sizes.kernel_w > 0, op, ": an empty kernel");
  AI3_CHECK(stride_h > 0 && stride_w > 0 && dilation_h > 0 && dilation_w > 0, op,
            ": stride and dilation must be positive");
  AI3_CHECK(pad_top >= 0 && pad_bottom >= 0 && pad_left >= 0 && pad_right >= 0, op, ": negative padding");
  const auto fits = [](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t span = in + pad - dilation * (kernel - 1) - 1;
    return span >= 0 && span / stride + 1 == out;
  };
  AI3_CHECK(fits(sizes.height, grad.size(2), sizes.kernel_h, stride_h, pad_top + pad_bottom, dilation_h) &&
                fits(sizes.width, grad.size(3), sizes.kernel_w, stride_w, pad_left + pad_right, dilation_w),
            op, ": a gradient of ", grad.size(2), "x", grad.size(3), " is not that of a convolution of ", sizes.height,
            "x", sizes.width, " images with this window");
  ai3_args args{};
  args.kernel_h = sizes.kernel_h;
  args.kernel_w = sizes.kernel_w;
  args.stride_h = stride_h;
  args.stride_w = stride_w;
  args.dilation_h = dilation_h;
  args.dilation_w = dilation_w;
  args.pad_top = pad_top;
  args.pad_bottom = pad_bottom;
  args.pad_left = pad_left;
  args.pad_right = pad_right;
  args.groups = groups;
  return args;
}

Tensor conv2d_grad_input(const Tensor& grad, const Tensor& weight, int64_t height, int64_t width, int64_t stride_h,
                         int64_t stride_w, int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                         int64_t dilation_h, int64_t dilation_w, int64_t groups, int64_t algorithm,
                         bool channels_last) {
  const char* op = "ai3::conv2d_grad_input";
  AI3_CHECK(weight.dim() == 4 && weight.numel() > 0, op, ": expected a weight [K,C/groups,R,S] that is not empty");
  check_like(op, "weight", grad, weight);
  const Sizes sizes{height, width, weight.size(0), weight.size(1), weight.size(2), weight.size(3)};
  ai3_args args = check_window(op, grad, sizes, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right,
                               dilation_h, dilation_w, groups);
  args.weight.ndim = 4;
  int64_t stride = 1;
  for (int d = 3; d >= 0; --d) {
    args.weight.size[d] = weight.size(d);
    args.weight.stride[d] = stride;
    stride *= weight.size(d);
  }
  const OptionalTensor none;
  const WeightSource source{weight, none, nullptr, nullptr, false};
  return run_image(algorithm, args, grad, sizes.group_channels * groups, height, width, channels_last, &source, none);
}

Tensor conv2d_grad_weight(const Tensor& grad, const Tensor& input, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                          int64_t stride_w, int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                          int64_t dilation_h, int64_t dilation_w, int64_t groups, int64_t algorithm,
                          bool channels_last) {
  const char* op = "ai3::conv2d_grad_weight";
  AI3_CHECK(grad.dim() == 4 && input.dim() == 4 && grad.size(0) == input.size(0), op,
            ": expected a gradient [N,K,P,Q] and an input [N,C,H,W], got ", grad.dim(), " and ", input.dim(),
            " dimensions");
  AI3_CHECK(groups > 0 && input.size(1) % groups == 0, op, ": ", input.size(1), " channels are not ", groups,
            " groups");
  check_like(op, "the gradient", input, grad);
  const Sizes sizes{input.size(2), input.size(3), grad.size(1), input.size(1) / groups, kernel_h, kernel_w};
  ai3_args args = check_window(op, grad, sizes, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right,
                               dilation_h, dilation_w, groups);
  const LoadedKernel& kernel = find_kernel(algorithm);
  const uint32_t flags = kernel.table->flags;
  AI3_CHECK((flags & (AI3_NCHW | AI3_NHWC)) != 0, kernel.label, ": its table names no layout");
  // As the image lies, where the algorithm takes it so.
  const bool nhwc = (flags & AI3_NCHW) == 0 || ((flags & AI3_NHWC) != 0 && !image_is(input, false));
  Tensor result = empty_image(input, {sizes.filters, sizes.group_channels, kernel_h, kernel_w}, channels_last);
  set_device(args, kernel, input);
  const Tensor image = image_as(input, nhwc), gradient = image_as(grad, nhwc);
  args.input = image_view(image, nhwc, false);
  args.key = image_view(gradient, nhwc, false);
  args.output = image_view(result, channels_last, true);
  check_supported(kernel, args);
  if (result.numel() == 0) return result;
  if (grad.numel() == 0) return torch::stable::zero_(result);
  run_ready(kernel, algorithm, args);
  return result;
}

}  // namespace
}  // namespace ai3

STABLE_TORCH_LIBRARY_FRAGMENT(ai3, m) {
  m.def(
      "conv2d_grad_input(Tensor grad, Tensor weight, int height, int width, int stride_h, int stride_w, int pad_top, "
      "int pad_bottom, int pad_left, int pad_right, int dilation_h, int dilation_w, int groups, int algorithm, "
      "bool channels_last=False) -> Tensor");
  m.def(
      "conv2d_grad_weight(Tensor grad, Tensor input, int kernel_h, int kernel_w, int stride_h, int stride_w, "
      "int pad_top, int pad_bottom, int pad_left, int pad_right, int dilation_h, int dilation_w, int groups, "
      "int algorithm, bool channels_last=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ai3, CPU, m) {
  m.impl("conv2d_grad_input", TORCH_BOX(&ai3::conv2d_grad_input));
  m.impl("conv2d_grad_weight", TORCH_BOX(&ai3::conv2d_grad_weight));
}

STABLE_TORCH_LIBRARY_IMPL(ai3, CUDA, m) {
  m.impl("conv2d_grad_input", TORCH_BOX(&ai3::conv2d_grad_input));
  m.impl("conv2d_grad_weight", TORCH_BOX(&ai3::conv2d_grad_weight));
}
