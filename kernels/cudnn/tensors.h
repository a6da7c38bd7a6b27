// Descriptors of cuDNN's named algorithms, which own what they describe.
#ifndef AI3_CUDNN_TENSORS_H
#define AI3_CUDNN_TENSORS_H

#include <utility>

#include "api.h"
#include "problem.h"

namespace ai3::cudnn {

inline cudnnDataType_t data_type(int64_t dtype) {
  switch (dtype) {
    case AI3_FLOAT64:
      return CUDNN_DATA_DOUBLE;
    case AI3_FLOAT16:
      return CUDNN_DATA_HALF;
    case AI3_BFLOAT16:
      return CUDNN_DATA_BFLOAT16;
    default:
      return CUDNN_DATA_FLOAT;
  }
}
// What sums are kept in.
inline cudnnDataType_t compute_type(int64_t dtype) {
  return dtype == AI3_FLOAT64 ? CUDNN_DATA_DOUBLE : CUDNN_DATA_FLOAT;
}

template <typename Descriptor, auto kDestroy>
class Owned {
 public:
  Owned() = default;
  Owned(Owned&& other) noexcept : descriptor_(std::exchange(other.descriptor_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~Owned() {
    if (descriptor_ != nullptr) (Api::get().*kDestroy)(descriptor_);
  }
  operator Descriptor() const { return descriptor_; }

 protected:
  Descriptor descriptor_ = nullptr;
};

struct TensorDescriptor : Owned<cudnnTensorDescriptor_t, &Api::DestroyTensorDescriptor> {
  void set(cudnnDataType_t type, const int64_t* size, const int64_t* stride) {
    check(Api::get().CreateTensorDescriptor(&descriptor_), "describing a tensor");
    check(Api::get().SetTensor4dDescriptorEx(descriptor_, type, int(size[0]), int(size[1]), int(size[2]), int(size[3]),
                                             int(stride[0]), int(stride[1]), int(stride[2]), int(stride[3])),
          "describing a tensor");
  }
  // A bias: a value for each channel of y.
  void set_channels(const Problem& p) {
    const int64_t size[4] = {1, p.y[1], 1, 1}, stride[4] = {p.y[1], 1, 1, 1};
    set(data_type(p.dtype), size, stride);
  }
};

struct FilterDescriptor : Owned<cudnnFilterDescriptor_t, &Api::DestroyFilterDescriptor> {
  void set(cudnnDataType_t type, cudnnTensorFormat_t format, const int64_t* size) {
    check(Api::get().CreateFilterDescriptor(&descriptor_), "describing a weight");
    check(Api::get().SetFilter4dDescriptor(descriptor_, type, format, int(size[0]), int(size[1]), int(size[2]),
                                           int(size[3])),
          "describing a weight");
  }
};

struct ConvolutionDescriptor : Owned<cudnnConvolutionDescriptor_t, &Api::DestroyConvolutionDescriptor> {
  void set(const Problem& p) {
    const Api& api = Api::get();
    check(api.CreateConvolutionDescriptor(&descriptor_), "describing a convolution");
    check(api.SetConvolution2dDescriptor(descriptor_, int(p.pad_before[0]), int(p.pad_before[1]), int(p.stride[0]),
                                         int(p.stride[1]), int(p.dilation[0]), int(p.dilation[1]),
                                         CUDNN_CROSS_CORRELATION, compute_type(p.dtype)),
          "describing a convolution");
    check(api.SetConvolutionGroupCount(descriptor_, int(p.groups)), "describing a convolution");
    // With the default, float32 may be rounded to TF32, but the shorter dtypes get no tensor cores.
    const bool is_short = p.dtype == AI3_FLOAT16 || p.dtype == AI3_BFLOAT16;
    const cudnnMathType_t math = is_short ? CUDNN_TENSOR_OP_MATH : p.strict != 0 ? CUDNN_FMA_MATH : CUDNN_DEFAULT_MATH;
    check(api.SetConvolutionMathType(descriptor_, math), "describing a convolution");
  }
};

struct ActivationDescriptor : Owned<cudnnActivationDescriptor_t, &Api::DestroyActivationDescriptor> {
  void set_identity() {
    check(Api::get().CreateActivationDescriptor(&descriptor_), "describing an activation");
    check(Api::get().SetActivationDescriptor(descriptor_, CUDNN_ACTIVATION_IDENTITY, CUDNN_NOT_PROPAGATE_NAN, 0),
          "describing an activation");
  }
};

// A factor, in the type that cuDNN wants it in.
class Factor {
 public:
  Factor(int64_t dtype, double value)
      : single_(static_cast<float>(value)), twice_(value), is_double_(dtype == AI3_FLOAT64) {}
  const void* get() const { return is_double_ ? static_cast<const void*>(&twice_) : &single_; }

 private:
  float single_;
  double twice_;
  bool is_double_;
};

inline void add_bias(cudnnHandle_t handle, int64_t dtype, cudnnTensorDescriptor_t bias, const void* values,
                     cudnnTensorDescriptor_t y, void* output) {
  const Factor one(dtype, 1);
  check(Api::get().AddTensor(handle, one.get(), bias, values, one.get(), y, output), "cudnnAddTensor");
}

// Copies a dense [K,C,R,S] weight between OIHW and the order of channels_last.
inline void reorder(cudnnHandle_t handle, int64_t dtype, const int64_t* size, const void* from, bool from_channels_last,
                    void* to, bool to_channels_last) {
  int64_t from_stride[4], to_stride[4];
  dense_strides(size, from_channels_last, from_stride);
  dense_strides(size, to_channels_last, to_stride);
  TensorDescriptor source, target;
  source.set(data_type(dtype), size, from_stride);
  target.set(data_type(dtype), size, to_stride);
  const Factor one(dtype, 1), zero(dtype, 0);
  check(Api::get().TransformTensor(handle, one.get(), source, from, zero.get(), target, to), "cudnnTransformTensor");
}

}  // namespace ai3::cudnn
#endif
