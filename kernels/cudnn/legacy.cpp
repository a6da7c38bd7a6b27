// Convolutions and their gradients by cuDNN's named algorithms: what it offers is asked once a shape, and kept.
#include <algorithm>
#include <atomic>
#include <limits>

#include "api.h"
#include "problem.h"
#include "support.h"
#include "tensors.h"

namespace ai3::cudnn {
namespace {

static_assert(int(Forward::kFft) == CUDNN_CONVOLUTION_FWD_ALGO_FFT);
static_assert(int(Forward::kWinogradNonfused) == CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED);
static_assert(int(GradInput::kWinogradNonfused) == CUDNN_CONVOLUTION_BWD_DATA_ALGO_WINOGRAD_NONFUSED);
static_assert(int(GradWeight::kAlgo3) == CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3);
static_assert(int(GradWeight::kFftTiling) == CUDNN_CONVOLUTION_BWD_FILTER_ALGO_FFT_TILING);

struct NamedPlan {
  std::string reason;  // why there is none, else empty
  TensorDescriptor x, y, bias;
  FilterDescriptor w;
  ConvolutionDescriptor convolution;
  ActivationDescriptor identity;
  size_t workspace = 0, own_workspace = 0;  // own: without the gradient of the weight in cuDNN's order
  bool transposes_gradient = false;
  std::atomic<bool> adds_bias{true};  // implicit precomp gemm: until cuDNN says that it cannot

  NamedPlan() = default;
  NamedPlan(NamedPlan&& other) noexcept
      : reason(std::move(other.reason)),
        x(std::move(other.x)),
        y(std::move(other.y)),
        bias(std::move(other.bias)),
        w(std::move(other.w)),
        convolution(std::move(other.convolution)),
        identity(std::move(other.identity)),
        workspace(other.workspace),
        own_workspace(other.own_workspace),
        transposes_gradient(other.transposes_gradient) {}
};

Cache<NamedPlan>& cache() {
  static Cache<NamedPlan>* cache = new Cache<NamedPlan>();
  return *cache;
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Why cuDNN cannot be asked at all.
const char* outside(const Problem& p) {
  if (p.dtype == AI3_OTHER) return "needs a float dtype";
  if (p.pad_before[0] != p.pad_after[0] || p.pad_before[1] != p.pad_after[1]) return "pads both sides alike only";
  for (const int64_t* sizes : {p.x, p.w, p.y, p.x_stride, p.y_stride}) {
    for (int d = 0; d < 4; ++d) {
      if (sizes[d] > std::numeric_limits<int>::max()) return "a size is beyond 32 bits";
    }
  }
  constexpr int64_t kWinogradNonfused[] = {int(Forward::kWinogradNonfused), int(GradInput::kWinogradNonfused),
                                           int(GradWeight::kWinogradNonfused)};
  // For 5x5 kernels it takes tiles of 13x13, whose transforms lose half of the digits.
  if (p.algorithm == kWinogradNonfused[p.operation] && (p.w[2] != 3 || p.w[3] != 3)) {
    return "needs a 3x3 kernel, as cuDNN's transforms for 5x5 err by 5e-3";
  }
  if (p.deterministic == 0) return nullptr;
  const bool adds_in_any_order = (p.operation == kGradInput && p.algorithm == CUDNN_CONVOLUTION_BWD_DATA_ALGO_0) ||
                                 (p.operation == kGradWeight && (p.algorithm == CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0 ||
                                                                 p.algorithm == CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3));
  return adds_in_any_order ? "is not deterministic" : nullptr;
}

void ask(const Problem& p, NamedPlan& plan) {
  const Api& api = Api::get();
  const OnDevice device(static_cast<int>(p.device));
  const cudnnHandle_t handle = handle_on(static_cast<int>(p.device));
  const cudnnDataType_t type = data_type(p.dtype);
  plan.x.set(type, p.x, p.x_stride);
  plan.y.set(type, p.y, p.y_stride);
  const bool channels_last = p.channels_last != 0;
  plan.w.set(type, channels_last ? CUDNN_TENSOR_NHWC : CUDNN_TENSOR_NCHW, p.w);
  plan.convolution.set(p);
  if (p.has_bias != 0) {
    plan.bias.set_channels(p);
    plan.identity.set_identity();
  }
  cudnnStatus_t status;
  if (p.operation == kForward) {
    status =
        api.GetConvolutionForwardWorkspaceSize(handle, plan.x, plan.w, plan.convolution, plan.y,
                                               static_cast<cudnnConvolutionFwdAlgo_t>(p.algorithm), &plan.workspace);
  } else if (p.operation == kGradInput) {
    status = api.GetConvolutionBackwardDataWorkspaceSize(handle, plan.w, plan.y, plan.convolution, plan.x,
                                                         static_cast<cudnnConvolutionBwdDataAlgo_t>(p.algorithm),
                                                         &plan.workspace);
  } else {
    status = api.GetConvolutionBackwardFilterWorkspaceSize(handle, plan.x, plan.y, plan.convolution, plan.w,
                                                           static_cast<cudnnConvolutionBwdFilterAlgo_t>(p.algorithm),
                                                           &plan.workspace);
  }
  if (status != CUDNN_STATUS_SUCCESS) {
    plan.reason = std::string("cuDNN does not offer it for this shape on this GPU: ") + api.GetErrorString(status);
    return;
  }
  plan.own_workspace = plan.workspace;
  if (p.operation == kGradWeight && p.w[1] > 1 && p.w[2] * p.w[3] > 1 && channels_last != (p.w_stride[1] == 1)) {
    plan.transposes_gradient = true;
    plan.workspace =
        aligned(plan.own_workspace) + static_cast<size_t>(p.w[0] * p.w[1] * p.w[2] * p.w[3] * p.element_size());
  }
  if (p.max_workspace >= 0 && plan.workspace > static_cast<size_t>(p.max_workspace)) {
    plan.reason = "needs a workspace of " + std::to_string(plan.workspace) + " bytes, more than the " +
                  std::to_string(p.max_workspace) + " allowed";
  }
}

NamedPlan make(const Problem& p) {
  NamedPlan plan;
  if (const char* reason = outside(p)) {
    plan.reason = reason;
    return plan;
  }
  try {
    ask(p, plan);
  } catch (const std::exception& error) {
    plan.reason = error.what();
  }
  return plan;
}

void forward(const ai3_args* a, const Problem& p, NamedPlan& plan, cudnnHandle_t handle, const void* weight) {
  const Api& api = Api::get();
  const Factor one(p.dtype, 1), zero(p.dtype, 0);
  const auto algorithm = static_cast<cudnnConvolutionFwdAlgo_t>(p.algorithm);
  void* output = a->output.data;
  // The one algorithm that cuDNN fuses with a bias alone.
  if (p.has_bias != 0 && algorithm == CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM &&
      plan.adds_bias.load(std::memory_order_relaxed)) {
    const cudnnStatus_t status = api.ConvolutionBiasActivationForward(
        handle, one.get(), plan.x, a->input.data, plan.w, weight, plan.convolution, algorithm, a->workspace,
        plan.own_workspace, zero.get(), plan.y, output, plan.bias, a->bias, plan.identity, plan.y, output);
    if (status == CUDNN_STATUS_SUCCESS) return;
    plan.adds_bias.store(false, std::memory_order_relaxed);
  }
  check(api.ConvolutionForward(handle, one.get(), plan.x, a->input.data, plan.w, weight, plan.convolution, algorithm,
                               a->workspace, plan.own_workspace, zero.get(), plan.y, output),
        "cudnnConvolutionForward");
  if (p.has_bias != 0) add_bias(handle, p.dtype, plan.bias, a->bias, plan.y, output);
}

void grad_weight(const ai3_args* a, const Problem& p, const NamedPlan& plan, cudnnHandle_t handle) {
  const Api& api = Api::get();
  const Factor one(p.dtype, 1), zero(p.dtype, 0);
  void* gradient = a->output.data;
  if (plan.transposes_gradient) gradient = static_cast<char*>(a->workspace) + aligned(plan.own_workspace);
  check(api.ConvolutionBackwardFilter(handle, one.get(), plan.x, a->input.data, plan.y, a->key.data, plan.convolution,
                                      static_cast<cudnnConvolutionBwdFilterAlgo_t>(p.algorithm), a->workspace,
                                      plan.own_workspace, zero.get(), plan.w, gradient),
        "cudnnConvolutionBackwardFilter");
  if (!plan.transposes_gradient) return;
  const bool channels_last = p.channels_last != 0;
  reorder(handle, p.dtype, p.w, gradient, channels_last, a->output.data, !channels_last);
}

Problem problem_of(const ai3_args* a, Operation operation, int algorithm) {
  Problem p(a, operation, algorithm);
  if (operation != kForward) p.has_bias = 0;
  // The core library applies these after run().
  p.has_residual = p.activation = 0;
  std::fill(p.residual_stride, p.residual_stride + 4, 0);
  std::fill(p.alignment, p.alignment + 5, 0);
  return p;
}

}  // namespace

const char* named_supports(const ai3_args* a, Operation operation, int algorithm) {
  const Problem p = problem_of(a, operation, algorithm);
  if (p.is_empty()) return outside(p);
  const NamedPlan& plan = cache().get(p, make);
  return plan.reason.empty() ? nullptr : plan.reason.c_str();
}

size_t named_workspace_bytes(const ai3_args* a, Operation operation, int algorithm) {
  const Problem p = problem_of(a, operation, algorithm);
  return p.is_empty() ? 0 : cache().get(p, make).workspace;
}

void named_run(const ai3_args* a, Operation operation, int algorithm) {
  try {
    const Problem p = problem_of(a, operation, algorithm);
    NamedPlan& plan = cache().get_again(p, make);
    if (!plan.reason.empty()) throw Failure(plan.reason);
    const OnDevice device(a->device);
    const cudnnHandle_t handle = handle_on(a->device);
    check(Api::get().SetStream(handle, static_cast<cudaStream_t>(a->stream)), "cudnnSetStream");
    const void* weight = a->packed != nullptr ? a->packed : a->weight.data;
    if (operation == kForward) {
      forward(a, p, plan, handle, weight);
    } else if (operation == kGradInput) {
      const Factor one(p.dtype, 1), zero(p.dtype, 0);
      check(Api::get().ConvolutionBackwardData(handle, one.get(), plan.w, weight, plan.y, a->input.data,
                                               plan.convolution, static_cast<cudnnConvolutionBwdDataAlgo_t>(algorithm),
                                               a->workspace, plan.own_workspace, zero.get(), plan.x, a->output.data),
            "cudnnConvolutionBackwardData");
    } else {
      grad_weight(a, p, plan, handle);
    }
  } catch (const std::exception& error) {
    a->runtime->fail(a->runtime, error.what());
  }
}

double cost(const ai3_args* args, Operation operation, const Rates& rates) {
  const Problem p(args, operation, 0);
  const double rate = p.dtype == AI3_FLOAT64   ? rates.float64
                      : p.dtype != AI3_FLOAT32 ? rates.half
                      : p.strict != 0          ? rates.strict
                                               : rates.tf32;
  constexpr double kLaunch = 2000, kBytesPerNanosecond = 4000;
  return kLaunch + std::max(p.flops() / (rate * 1e3), p.bytes() / kBytesPerNanosecond);
}

size_t packed_bytes(const ai3_args* args) {
  if (!is_channels_last(args->input) || !has_own_order(args)) return 0;
  const Problem p(args, kForward, 0);
  return static_cast<size_t>(p.w[0] * p.w[1] * p.w[2] * p.w[3] * p.element_size());
}

int64_t pack_variant(const ai3_args* args) { return packed_bytes(args) > 0 ? 1 : 0; }

void pack(const ai3_args* args, void* dst) {
  try {
    const OnDevice device(args->device);
    const cudnnHandle_t handle = handle_on(args->device);
    check(Api::get().SetStream(handle, static_cast<cudaStream_t>(args->stream)), "cudnnSetStream");
    reorder(handle, args->dtype, args->weight.size, args->weight.data, false, dst, true);
  } catch (const std::exception& error) {
    if (args->runtime != nullptr) args->runtime->fail(args->runtime, error.what());
  }
}

}  // namespace ai3::cudnn
