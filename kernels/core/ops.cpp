// The operations ai3 registers with PyTorch: schemas and implementations. Attributes are scalar ints, since a list
// costs a microsecond a call; `algorithm` is the id of one algorithm on one platform (ai3_compile/registry.py).
#include <torch/csrc/stable/library.h>

#include <utility>

#include "device.h"
#include "unboxed.h"

namespace ai3 {
namespace {

void check_place(const char* op, const char* what, const Tensor& input, const Tensor& other) {
  const Place there = place_of(other), here = place_of(input);
  AI3_CHECK(there == here, op, ": ", what, " is on ", name_of(there), ", and the input on ", name_of(here));
}

// As check_like, but on a GPU a parameter may be of float32 beside an input of halves, as under autocast: what is made
// of it once is cast with it.
void check_parameter(const char* op, const char* what, const Tensor& input, const OptionalTensor& parameter) {
  const ai3_dtype dtype = dtype_of(input);
  const bool is_half = dtype == AI3_FLOAT16 || dtype == AI3_BFLOAT16;
  if (parameter && is_half && input.is_cuda() && dtype_of(*parameter) == AI3_FLOAT32)
    return check_place(op, what, input, *parameter);
  check_like(op, what, input, parameter);
}

}  // namespace

void check_like(const char* op, const char* what, const Tensor& input, const OptionalTensor& other) {
  if (!other) return;
  AI3_CHECK(other->scalar_type() == input.scalar_type(), op, ": ", what, " and input have different dtypes");
  check_place(op, what, input, *other);
}

void check_image(const char* op, const Tensor& input) {
  AI3_CHECK(input.dim() == 3 || input.dim() == 4, op, ": expected an input [N,C,H,W] or [C,H,W], got ", input.dim(),
            " dimensions");
}

ai3_tensor any_view(const Tensor& t) {
  ai3_tensor view{};
  view.data = const_cast<void*>(t.const_data_ptr());
  view.ndim = static_cast<int32_t>(t.dim());
  for (int32_t d = 0; d < view.ndim; ++d) {
    view.size[d] = t.size(d);
    view.stride[d] = t.stride(d);
  }
  return view;
}

namespace {

ai3_tensor contiguous_view(void* data, std::initializer_list<int64_t> sizes) {
  ai3_tensor view{};
  view.data = data;
  view.ndim = static_cast<int32_t>(sizes.size());
  int d = 0;
  for (int64_t s : sizes) view.size[d++] = s;
  int64_t stride = 1;
  for (d = view.ndim - 1; d >= 0; --d) {
    view.stride[d] = stride;
    stride *= view.size[d] > 0 ? view.size[d] : 1;
  }
  return view;
}

ai3_activation activation_of(const char* op, int64_t number) {
  AI3_CHECK(AI3_IDENTITY <= number && number <= AI3_GELU_TANH, op, ": no activation has the number ", number);
  return static_cast<ai3_activation>(number);
}

OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(as_contiguous(*t)) : std::nullopt; }

int64_t conv_extent(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t span = in + pad - dilation * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

// What a convolution is called with besides its algorithm and its residual, checked.
struct Convolution {
  ai3_args args;
  int64_t out_h, out_w;
  OptionalTensor bias;  // contiguous
  std::optional<BatchNorm> norm;
  std::optional<BatchNorm> prologue;  // of the input

  WeightSource source(const Tensor& weight, bool is_static) const {
    return {weight, bias, norm ? &*norm : nullptr, prologue ? &*prologue : nullptr, is_static};
  }
};

// Whether there is a batch norm.
bool check_norm(const char* op, const Tensor& input, const BatchNorm& norm, int64_t channels) {
  const bool given = norm.mean.has_value() && norm.var.has_value();
  for (const OptionalTensor* t : {&norm.weight, &norm.bias, &norm.mean, &norm.var}) {
    check_parameter(op, "a batch norm parameter", input, *t);
    AI3_CHECK(!*t || (given && (*t)->numel() == channels), op, ": batch norm needs a mean and a variance of ", channels,
              " elements");
  }
  return given;
}

Convolution check_conv2d(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                         int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom, int64_t pad_left,
                         int64_t pad_right, int64_t dilation_h, int64_t dilation_w, int64_t groups, int64_t activation,
                         const BatchNorm& norm) {
  check_image(op, input);
  AI3_CHECK(weight.dim() == 4, op, ": expected a weight [K,C/groups,R,S], got ", weight.dim(), " dimensions");
  AI3_CHECK(groups > 0 && channels_of(input) == weight.size(1) * groups && weight.size(0) % groups == 0, op,
            ": an input of ", channels_of(input), " channels does not fit a weight of ", weight.size(0), "x",
            weight.size(1), " channels with ", groups, " groups");
  AI3_CHECK(stride_h > 0 && stride_w > 0 && dilation_h > 0 && dilation_w > 0, op,
            ": stride and dilation must be positive");
  AI3_CHECK(pad_top >= 0 && pad_bottom >= 0 && pad_left >= 0 && pad_right >= 0, op, ": negative padding");
  AI3_CHECK(weight.numel() > 0, op, ": an empty weight");
  check_parameter(op, "weight", input, weight);
  check_parameter(op, "bias", input, bias);
  AI3_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), op, ": expected a bias of ", weight.size(0),
            " elements");
  const bool folds = check_norm(op, input, norm, weight.size(0));
  ai3_args args{};
  args.kernel_h = weight.size(2);
  args.kernel_w = weight.size(3);
  args.stride_h = stride_h;
  args.stride_w = stride_w;
  args.dilation_h = dilation_h;
  args.dilation_w = dilation_w;
  args.pad_top = pad_top;
  args.pad_bottom = pad_bottom;
  args.pad_left = pad_left;
  args.pad_right = pad_right;
  args.groups = groups;
  args.has_bias = bias.has_value() || folds;
  args.activation = activation_of(op, activation);
  args.weight = contiguous_view(nullptr, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)});
  const int64_t out_h = conv_extent(height_of(input), args.kernel_h, stride_h, pad_top + pad_bottom, dilation_h);
  const int64_t out_w = conv_extent(width_of(input), args.kernel_w, stride_w, pad_left + pad_right, dilation_w);
  AI3_CHECK(out_h > 0 && out_w > 0, op, ": the kernel is larger than the padded input");
  return {args, out_h, out_w, contiguous(bias), folds ? std::optional<BatchNorm>(norm) : std::nullopt, {}};
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, int64_t stride_h, int64_t stride_w,
              int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right, int64_t dilation_h,
              int64_t dilation_w, int64_t groups, int64_t algorithm, bool channels_last, bool static_weight,
              const OptionalTensor& residual, int64_t activation, const OptionalTensor& bn_weight,
              const OptionalTensor& bn_bias, const OptionalTensor& bn_mean, const OptionalTensor& bn_var, double bn_eps,
              const OptionalTensor& prologue_weight, const OptionalTensor& prologue_bias,
              const OptionalTensor& prologue_mean, const OptionalTensor& prologue_var, double prologue_eps,
              int64_t prologue_activation) {
  const char* op = "ai3::conv2d";
  Convolution conv =
      check_conv2d(op, input, weight, bias, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h,
                   dilation_w, groups, activation, {bn_weight, bn_bias, bn_mean, bn_var, bn_eps});
  check_like(op, "residual", input, residual);
  const BatchNorm prologue = {prologue_weight, prologue_bias, prologue_mean, prologue_var, prologue_eps};
  if (check_norm(op, input, prologue, channels_of(input))) {
    const ai3_args& a = conv.args;
    AI3_CHECK(a.kernel_h * a.kernel_w == 1 && (pad_top | pad_bottom | pad_left | pad_right) == 0, op,
              ": a batch norm of the input needs a 1x1 kernel without padding");
    conv.prologue = prologue;
    conv.args.has_prologue = 1;
    conv.args.prologue_activation = activation_of(op, prologue_activation);
  }
  if (residual) {
    AI3_CHECK(
        residual->dim() == input.dim() &&
            residual->numel() == (input.dim() == 4 ? input.size(0) : 1) * weight.size(0) * conv.out_h * conv.out_w &&
            height_of(*residual) == conv.out_h && width_of(*residual) == conv.out_w,
        op, ": the residual does not have the output's shape");
  }
  const WeightSource source = conv.source(weight, static_weight);
  return run_image(algorithm, conv.args, input, weight.size(0), conv.out_h, conv.out_w, channels_last, &source,
                   residual);
}

void conv2d_into(const Tensor& output, int64_t channel, const Tensor& input, const Tensor& weight,
                 const OptionalTensor& bias, int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_bottom,
                 int64_t pad_left, int64_t pad_right, int64_t dilation_h, int64_t dilation_w, int64_t groups,
                 int64_t algorithm, bool static_weight, int64_t activation, const OptionalTensor& bn_weight,
                 const OptionalTensor& bn_bias, const OptionalTensor& bn_mean, const OptionalTensor& bn_var,
                 double bn_eps, bool adds) {
  const char* op = "ai3::conv2d_into";
  const Convolution conv =
      check_conv2d(op, input, weight, bias, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h,
                   dilation_w, groups, activation, {bn_weight, bn_bias, bn_mean, bn_var, bn_eps});
  const WeightSource source = conv.source(weight, static_weight);
  run_image_into(op, algorithm, conv.args, input, output, channel, weight.size(0), conv.out_h, conv.out_w, &source,
                 adds);
}

Tensor conv2d_pooled(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, int64_t stride_h,
                     int64_t stride_w, int64_t pad_top, int64_t pad_bottom, int64_t pad_left, int64_t pad_right,
                     int64_t dilation_h, int64_t dilation_w, int64_t groups, int64_t algorithm, int64_t pool_algorithm,
                     bool static_weight, int64_t activation, const OptionalTensor& bn_weight,
                     const OptionalTensor& bn_bias, const OptionalTensor& bn_mean, const OptionalTensor& bn_var,
                     double bn_eps) {
  const char* op = "ai3::conv2d_pooled";
  const Convolution conv =
      check_conv2d(op, input, weight, bias, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h,
                   dilation_w, groups, activation, {bn_weight, bn_bias, bn_mean, bn_var, bn_eps});
  AI3_CHECK(conv.out_h > 1 && conv.out_w > 1, op, ": no 2x2 pixels in ", conv.out_h, "x", conv.out_w);
  return run_pooled(algorithm, pool_algorithm, conv.args, input, weight.size(0), conv.out_h, conv.out_w,
                    conv.source(weight, static_weight));
}

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, int64_t algorithm,
              bool static_weight, const OptionalTensor& residual, int64_t activation) {
  const char* op = "ai3::linear";
  AI3_CHECK(weight.dim() == 2 && input.dim() >= 1 && input.size(input.dim() - 1) == weight.size(1), op,
            ": an input of ", input.dim() >= 1 ? input.size(input.dim() - 1) : 0, " features does not fit a weight of ",
            weight.dim(), " dimensions, ", weight.size(weight.dim() - 1), " features");
  check_parameter(op, "weight", input, weight);
  check_parameter(op, "bias", input, bias);
  check_like(op, "residual", input, residual);
  AI3_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), op, ": expected a bias of ", weight.size(0),
            " elements");
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = weight.size(0);
  Tensor result = empty_contiguous(input, sizes);
  AI3_CHECK(!residual || residual->numel() == result.numel(), op, ": the residual does not have the output's shape");
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];

  const LoadedKernel& kernel = find_kernel(algorithm);
  const Tensor in = as_contiguous(input);
  const OptionalTensor dense_bias = contiguous(bias);
  const OptionalTensor dense_residual = contiguous(residual);
  ai3_args args{};
  set_device(args, kernel, input, true);
  args.input = contiguous_view(const_cast<void*>(in.const_data_ptr()), {rows, weight.size(1)});
  args.weight = contiguous_view(nullptr, {weight.size(0), weight.size(1)});
  args.output = contiguous_view(result.mutable_data_ptr(), {rows, weight.size(0)});
  args.groups = 1;
  args.has_bias = bias.has_value();
  args.activation = activation_of(op, activation);
  if (dense_residual) {
    args.residual = contiguous_view(const_cast<void*>(dense_residual->const_data_ptr()), {rows, weight.size(0)});
    args.has_residual = 1;
  }
  check_supported(kernel, args);
  if (result.numel() == 0) return result;
  const PreparedWeight prepared =
      prepare_weight(kernel, algorithm, args, WeightSource{weight, dense_bias, nullptr, nullptr, static_weight});
  args.weight.data = const_cast<void*>(prepared.weight);
  args.bias = prepared.bias;
  args.packed = prepared.packed;
  run_ready(kernel, algorithm, args);
  return result;
}

Tensor relu(const Tensor& input, int64_t algorithm) {
  const LoadedKernel& kernel = find_kernel(algorithm);
  // Elementwise: memory order is irrelevant as long as the output has the input's. What empty_as makes is dense, so
  // an input of the same strides is dense too.
  Tensor result = empty_as(input);
  bool same_order = true;
  for (int64_t d = 0; d < input.dim(); ++d) {
    same_order = same_order && (input.size(d) == 1 || input.stride(d) == result.stride(d));
  }
  Tensor in = same_order ? input : empty_as(input);
  if (!same_order) torch::stable::copy_(in, input);
  ai3_args args{};
  set_device(args, kernel, input);
  args.input = contiguous_view(const_cast<void*>(in.const_data_ptr()), {in.numel()});
  args.output = contiguous_view(result.mutable_data_ptr(), {in.numel()});
  check_supported(kernel, args);
  if (result.numel() > 0) run_ready(kernel, algorithm, args);
  return result;
}

Tensor flatten(const Tensor& input, int64_t start_dim, int64_t end_dim, int64_t algorithm) {
  const LoadedKernel& kernel = find_kernel(algorithm);
  const int64_t ndim = input.dim();
  const int64_t first = start_dim < 0 ? start_dim + ndim : start_dim;
  const int64_t last = end_dim < 0 ? end_dim + ndim : end_dim;
  AI3_CHECK(0 <= first && first <= last && last < ndim && ndim <= AI3_MAX_DIMS,
            "ai3::flatten: cannot flatten dimensions ", start_dim, " to ", end_dim, " of a tensor of ", ndim);
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < ndim; ++d) {
    if (d > first && d <= last)
      sizes.back() *= input.size(d);
    else
      sizes.push_back(input.size(d));
  }
  Tensor result = empty_contiguous(input, sizes);
  ai3_args args{};
  set_device(args, kernel, input);
  args.input = any_view(input);
  args.output = contiguous_view(result.mutable_data_ptr(), {result.numel()});
  check_supported(kernel, args);
  if (result.numel() > 0) run_ready(kernel, algorithm, args);
  return result;
}

struct Registered {
  Operation operation;
  void (*boxed)(StableIValue* stack, uint64_t arguments, uint64_t returns);
};

#define AI3_OPERATION(function, ...) \
  {{#function, Unboxed<&function>::accepts, Unboxed<&function>::call, __VA_ARGS__}, TORCH_BOX(&function)}
constexpr Registered kOperations[] = {
    AI3_OPERATION(conv2d, 1 | 1 << 15, 14),  // the input and the residual
    AI3_OPERATION(linear, 0),
    AI3_OPERATION(max_pool2d, 1),
    AI3_OPERATION(avg_pool2d, 1),
    AI3_OPERATION(conv2d_into, 1 | 1 << 2, 15),  // the output and the input
    AI3_OPERATION(conv2d_pooled, 1, 14),
    AI3_OPERATION(max_pool2d_into, 1 | 1 << 2),
    AI3_OPERATION(avg_pool2d_into, 1 | 1 << 2),
    AI3_OPERATION(adaptive_avg_pool2d, 1),
    AI3_OPERATION(relu, 1),
    AI3_OPERATION(flatten, 0),
    AI3_OPERATION(attention, 0),
};
#undef AI3_OPERATION

}  // namespace

const Operation* find_operation(std::string_view name) {
  for (const Registered& registered : kOperations) {
    if (registered.operation.name == name) return &registered.operation;
  }
  return nullptr;
}

}  // namespace ai3

STABLE_TORCH_LIBRARY(ai3, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, int stride_h, int stride_w, int pad_top, int pad_bottom, "
      "int pad_left, int pad_right, int dilation_h, int dilation_w, int groups, int algorithm, "
      "bool channels_last=False, bool static_weight=False, Tensor? residual=None, int activation=0, "
      "Tensor? bn_weight=None, Tensor? bn_bias=None, Tensor? bn_mean=None, Tensor? bn_var=None, float bn_eps=0.0, "
      "Tensor? prologue_weight=None, Tensor? prologue_bias=None, Tensor? prologue_mean=None, "
      "Tensor? prologue_var=None, float prologue_eps=0.0, int prologue_activation=0) -> Tensor");
  m.def(
      "linear(Tensor input, Tensor weight, Tensor? bias, int algorithm, bool static_weight=False, "
      "Tensor? residual=None, int activation=0) -> Tensor");
  m.def(
      "max_pool2d(Tensor input, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, "
      "int dilation_h, int dilation_w, bool ceil_mode, int algorithm, bool channels_last=False) -> Tensor");
  m.def(
      "avg_pool2d(Tensor input, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, "
      "bool ceil_mode, bool count_include_pad, int divisor_override, int algorithm, bool channels_last=False) -> "
      "Tensor");
  // The same into the channels of `output`, a channels_last image, from `channel` on; added to what is there, before
  // the activation, with `adds`.
  m.def(
      "conv2d_into(Tensor(a!) output, int channel, Tensor input, Tensor weight, Tensor? bias, int stride_h, "
      "int stride_w, int pad_top, int pad_bottom, int pad_left, int pad_right, int dilation_h, int dilation_w, "
      "int groups, int algorithm, bool static_weight=False, int activation=0, Tensor? bn_weight=None, "
      "Tensor? bn_bias=None, Tensor? bn_mean=None, Tensor? bn_var=None, float bn_eps=0.0, bool adds=False) -> ()");
  // The largest of each 2x2 pixels of a convolution's result, in channels_last; `pool_algorithm` pools where
  // `algorithm` does not do so itself.
  m.def(
      "conv2d_pooled(Tensor input, Tensor weight, Tensor? bias, int stride_h, int stride_w, int pad_top, "
      "int pad_bottom, int pad_left, int pad_right, int dilation_h, int dilation_w, int groups, int algorithm, "
      "int pool_algorithm, bool static_weight=False, int activation=0, Tensor? bn_weight=None, Tensor? bn_bias=None, "
      "Tensor? bn_mean=None, Tensor? bn_var=None, float bn_eps=0.0) -> Tensor");
  m.def(
      "max_pool2d_into(Tensor(a!) output, int channel, Tensor input, int kernel_h, int kernel_w, int stride_h, "
      "int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, bool ceil_mode, int algorithm) -> ()");
  m.def(
      "avg_pool2d_into(Tensor(a!) output, int channel, Tensor input, int kernel_h, int kernel_w, int stride_h, "
      "int stride_w, int pad_h, int pad_w, bool ceil_mode, bool count_include_pad, int divisor_override, "
      "int algorithm) -> ()");
  m.def("adaptive_avg_pool2d(Tensor input, int out_h, int out_w, int algorithm, bool channels_last=False) -> Tensor");
  m.def("relu(Tensor input, int algorithm) -> Tensor");
  m.def("flatten(Tensor input, int start_dim, int end_dim, int algorithm) -> Tensor");
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, float scale, bool is_causal, "
      "bool masked_is_zero, int algorithm) -> Tensor");
  // Called by the core library, implemented in Python (ai3_compile/core.py).
  m.def("_load_algorithm(int algorithm) -> ()");
  m.def("_watch_weight(Tensor weight) -> ()");
  m.def(
      "_fold(Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor bn_mean, Tensor bn_var, "
      "float bn_eps) -> (Tensor, Tensor)");
  m.def("_cast(Tensor parameter, int dtype) -> Tensor");
  m.def("_scale_and_shift(Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ai3, CPU, m) {
  for (const ai3::Registered& registered : ai3::kOperations) m.impl(registered.operation.name.data(), registered.boxed);
}

STABLE_TORCH_LIBRARY_IMPL(ai3, CUDA, m) {
  for (const ai3::Registered& registered : ai3::kOperations) m.impl(registered.operation.name.data(), registered.boxed);
}
