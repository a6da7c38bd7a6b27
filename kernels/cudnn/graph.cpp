// The graphs of cuDNN's backend API: tensors, the convolution, and the pointwise operations after it.
#include "graph.h"

#include <utility>
namespace ai3::cudnn {
namespace {

// What is done to the running value, one after another: the first operand is that value.
struct Pointwise {
  cudnnPointwiseMode_t mode;
  TensorId operand = kTensorIds;  // none
  bool is_clipped = false;        // relu6
  bool takes_sum = false;         // its operand is the value before the activation
};

std::vector<Pointwise> activation(int64_t kind) {
  constexpr Pointwise kClip = {CUDNN_POINTWISE_RELU_FWD, kTensorIds, true};
  switch (kind) {
    case AI3_RELU:
      return {{CUDNN_POINTWISE_RELU_FWD}};
    case AI3_RELU6:
      return {kClip};
    case AI3_HARDSIGMOID:
      return {{CUDNN_POINTWISE_ADD, kThree}, kClip, {CUDNN_POINTWISE_MUL, kSixth}};
    case AI3_HARDSWISH:
      return {{CUDNN_POINTWISE_ADD, kThree},
              kClip,
              {CUDNN_POINTWISE_MUL, kSixth},
              {CUDNN_POINTWISE_MUL, kTensorIds, false, true}};
    case AI3_SIGMOID:
      return {{CUDNN_POINTWISE_SIGMOID_FWD}};
    case AI3_SILU:
      return {{CUDNN_POINTWISE_SWISH_FWD}};
    case AI3_GELU:
      return {{CUDNN_POINTWISE_GELU_FWD}};
    case AI3_GELU_TANH:
      return {{CUDNN_POINTWISE_GELU_APPROX_TANH_FWD}};
    default:
      return {};
  }
}

class Builder {
 public:
  Builder(const Problem& problem, Graph& graph) : p_(problem), graph_(graph), compute_(compute_type(problem.dtype)) {
    graph_.parts.reserve(64);  // references to parts stay
  }

  const Descriptor& tensor(TensorId id) {
    const int64_t channels[4] = {1, p_.y[1], 1, 1}, channel_strides[4] = {p_.y[1], 1, p_.y[1], p_.y[1]};
    const int64_t scalar[4] = {1, 1, 1, 1};
    const cudnnDataType_t type = data_type(p_.dtype);
    switch (id) {
      case kX:
        return in_memory(id, type, p_.x, p_.x_stride, p_.alignment[0]);
      case kW:
        return in_memory(id, type, p_.w, p_.w_stride, p_.alignment[1]);
      case kBias:
        return in_memory(id, type, channels, channel_strides, p_.alignment[3]);
      case kResidual:
        return in_memory(id, type, p_.y, p_.residual_stride, p_.alignment[4]);
      case kThree:
      case kSixth: {
        Descriptor& made = describe(id, compute_, scalar, scalar, p_.element_size() == 8 ? 8 : 4);
        graph_.ids.push_back(id);
        return made.set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, true).finalize();
      }
      default:
        return in_memory(id, type, p_.y, p_.y_stride, p_.alignment[2]);
    }
  }

  const Descriptor& between() {
    Descriptor& made = describe(next_virtual_++, compute_, p_.y, p_.y_stride, 16);
    return made.set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, true).finalize();
  }

  void convolution(const Descriptor& y) {
    const int64_t spatial = 2;
    const cudnnConvolutionMode_t mode = CUDNN_CROSS_CORRELATION;
    Descriptor& convolution = add(CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR);
    convolution.set(CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, spatial)
        .set(CUDNN_ATTR_CONVOLUTION_COMP_TYPE, compute_)
        .set(CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_TYPE_CONVOLUTION_MODE, 1, &mode)
        .set(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, CUDNN_TYPE_INT64, 2, p_.pad_before)
        .set(CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, CUDNN_TYPE_INT64, 2, p_.pad_after)
        .set(CUDNN_ATTR_CONVOLUTION_DILATIONS, CUDNN_TYPE_INT64, 2, p_.dilation)
        .set(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, CUDNN_TYPE_INT64, 2, p_.stride)
        .finalize();
    const Descriptor &x = tensor(kX), &w = tensor(kW);
    Descriptor& operation = add(CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR);
    operation.set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC, convolution)
        .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, x)
        .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W, w)
        .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, y);
    scale(operation, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA, 1);
    scale(operation, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA, 0);
    operations_.push_back(operation.finalize().raw());
  }

  void pointwise(const Pointwise& step, const Descriptor& x, const Descriptor* operand, const Descriptor& y) {
    Descriptor& kind = add(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    kind.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &step.mode)
        .set(CUDNN_ATTR_POINTWISE_MATH_PREC, compute_);
    if (step.is_clipped) {
      const double low = 0, high = 6;
      kind.set(CUDNN_ATTR_POINTWISE_RELU_LOWER_CLIP, CUDNN_TYPE_DOUBLE, 1, &low)
          .set(CUDNN_ATTR_POINTWISE_RELU_UPPER_CLIP, CUDNN_TYPE_DOUBLE, 1, &high);
    }
    kind.finalize();
    Descriptor& operation = add(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    operation.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, kind).set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
    if (operand != nullptr) operation.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, *operand);
    operations_.push_back(operation.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y).finalize().raw());
  }

  void finish(cudnnHandle_t handle) {
    graph_.operations = Descriptor(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    graph_.operations
        .set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, static_cast<int64_t>(operations_.size()),
             operations_.data())
        .set_handle(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, handle)
        .finalize();
  }

 private:
  Descriptor& add(cudnnBackendDescriptorType_t type) { return graph_.parts.emplace_back(type); }

  Descriptor& describe(int64_t id, cudnnDataType_t type, const int64_t* size, const int64_t* stride,
                       int64_t alignment) {
    return add(CUDNN_BACKEND_TENSOR_DESCRIPTOR)
        .set(CUDNN_ATTR_TENSOR_UNIQUE_ID, id)
        .set(CUDNN_ATTR_TENSOR_DATA_TYPE, type)
        .set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, alignment)
        .set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, size)
        .set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, stride);
  }

  const Descriptor& in_memory(TensorId id, cudnnDataType_t type, const int64_t* size, const int64_t* stride,
                              int64_t alignment) {
    graph_.ids.push_back(id);
    return describe(id, type, size, stride, alignment).finalize();
  }

  void scale(Descriptor& operation, cudnnBackendAttributeName_t name, double value) {
    const float single = static_cast<float>(value);
    if (compute_ == CUDNN_DATA_DOUBLE) {
      operation.set(name, CUDNN_TYPE_DOUBLE, 1, &value);
    } else {
      operation.set(name, CUDNN_TYPE_FLOAT, 1, &single);
    }
  }

  const Problem& p_;
  Graph& graph_;
  const cudnnDataType_t compute_;
  std::vector<cudnnBackendDescriptor_t> operations_;
  int64_t next_virtual_ = 100;
};

}  // namespace

Descriptor::Descriptor(cudnnBackendDescriptorType_t type) {
  check(Api::get().BackendCreateDescriptor(type, &descriptor_), "making a descriptor");
}

Descriptor::Descriptor(Descriptor&& other) noexcept : descriptor_(std::exchange(other.descriptor_, nullptr)) {}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

Descriptor::~Descriptor() {
  if (descriptor_ != nullptr) Api::get().BackendDestroyDescriptor(descriptor_);
}

Descriptor& Descriptor::set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                            const void* values) {
  check(Api::get().BackendSetAttribute(descriptor_, name, type, count, values), "describing a graph");
  return *this;
}

Descriptor& Descriptor::finalize() {
  check(Api::get().BackendFinalize(descriptor_), "a graph");
  return *this;
}

int64_t Descriptor::get(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                        void* values) const {
  int64_t found = 0;
  const cudnnStatus_t status = Api::get().BackendGetAttribute(descriptor_, name, type, count, &found, values);
  return status == CUDNN_STATUS_SUCCESS ? found : 0;
}

Graph make_graph(const Problem& p, Part part, cudnnHandle_t handle) {
  std::vector<Pointwise> steps;
  size_t activation_at = 0;
  if (part != Part::kConvolution) {
    if (part == Part::kGeneric) steps.push_back({CUDNN_POINTWISE_IDENTITY});
    if (p.has_bias != 0) steps.push_back({CUDNN_POINTWISE_ADD, kBias});
    if (p.has_residual != 0) steps.push_back({CUDNN_POINTWISE_ADD, kResidual});
    activation_at = steps.size();
    const std::vector<Pointwise> last = activation(p.activation);
    steps.insert(steps.end(), last.begin(), last.end());
  }
  Graph graph;
  Builder builder(p, graph);
  const Descriptor* sum = nullptr;
  const Descriptor* value = steps.empty() ? &builder.tensor(kY) : &builder.between();
  builder.convolution(*value);
  for (size_t i = 0; i < steps.size(); ++i) {
    if (i == activation_at) sum = value;
    const TensorId id = steps[i].operand;
    const Descriptor* operand = steps[i].takes_sum ? sum : id == kTensorIds ? nullptr : &builder.tensor(id);
    const Descriptor& next = i + 1 == steps.size() ? builder.tensor(kY) : builder.between();
    builder.pointwise(steps[i], *value, operand, next);
    value = &next;
  }
  builder.finish(handle);
  return graph;
}

}  // namespace ai3::cudnn
