#include "problem.h"

#include <algorithm>

namespace ai3::cudnn {
namespace {

void copy4(const int64_t* from, int64_t* to) { std::copy(from, from + 4, to); }

// An unknown one is PyTorch's own memory.
int64_t alignment_of(const void* pointer) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer) | kMostAlignment;
  return static_cast<int64_t>(address & (~address + 1));
}

}  // namespace

void dense_strides(const int64_t* size, bool channels_last, int64_t* stride) {
  const int64_t c = size[1], h = size[2], w = size[3];
  const int64_t nhwc[4] = {c * h * w, 1, w * c, c}, nchw[4] = {c * h * w, h * w, w, 1};
  copy4(channels_last ? nhwc : nchw, stride);
}

bool is_channels_last(const ai3_tensor& image) {
  return image.stride[3] > 1 || (image.size[1] == 1 && image.stride[1] == 1);
}

Problem::Problem(const ai3_args* args, Operation op, int64_t algo) {
  std::memset(static_cast<void*>(this), 0, sizeof *this);
  const ai3_tensor& image = op == kGradInput ? args->output : args->input;
  const ai3_tensor& result = op == kForward ? args->output : op == kGradInput ? args->input : args->key;
  const ai3_tensor& weight = op == kGradWeight ? args->output : args->weight;
  operation = op;
  algorithm = algo;
  dtype = args->dtype;
  device = args->device;
  sm = args->sm;
  strict = args->dtype == AI3_FLOAT32 && args->allow_tf32 == 0;
  deterministic = args->deterministic != 0;
  max_workspace = std::max<int64_t>(args->max_workspace, -1);
  channels_last = is_channels_last(args->input);
  copy4(image.size, x);
  copy4(image.stride, x_stride);
  copy4(weight.size, w);
  copy4(result.size, y);
  copy4(result.stride, y_stride);
  if (op == kGradWeight) {
    copy4(weight.stride, w_stride);
  } else {
    dense_strides(w, channels_last != 0, w_stride);
  }
  stride[0] = args->stride_h;
  stride[1] = args->stride_w;
  dilation[0] = args->dilation_h;
  dilation[1] = args->dilation_w;
  pad_before[0] = args->pad_top;
  pad_before[1] = args->pad_left;
  pad_after[0] = args->pad_bottom;
  pad_after[1] = args->pad_right;
  groups = args->groups;
  has_bias = args->has_bias != 0;
  has_residual = args->has_residual != 0;
  activation = args->activation;
  if (has_residual != 0) copy4(args->residual.stride, residual_stride);
  const void* weights = args->packed != nullptr && op != kGradWeight ? args->packed : weight.data;
  const void* pointers[5] = {image.data, weights, result.data, args->bias, args->residual.data};
  for (int i = 0; i < 5; ++i) alignment[i] = alignment_of(pointers[i]);
}

bool Problem::is_empty() const {
  int64_t elements = 1;
  for (int d = 0; d < 4; ++d) elements *= x[d] * w[d] * y[d];
  return elements == 0;
}

double Problem::flops() const {
  return 2.0 * double(y[0]) * double(y[1]) * double(y[2]) * double(y[3]) * double(w[1]) * double(w[2]) * double(w[3]);
}

double Problem::bytes() const {
  const auto count = [](const int64_t* size) {
    return double(size[0]) * double(size[1]) * double(size[2]) * double(size[3]);
  };
  return double(element_size()) * (count(x) + count(w) + count(y) * (has_residual != 0 ? 2 : 1));
}

size_t ProblemHash::operator()(const Problem& problem) const {
  uint64_t words[sizeof(Problem) / 8], hash = 0;
  std::memcpy(words, &problem, sizeof problem);
  for (const uint64_t word : words) hash = (hash ^ word) * 0x9e3779b97f4a7c15ull + (hash >> 29);
  return static_cast<size_t>(hash ^ (hash >> 32));
}

}  // namespace ai3::cudnn
