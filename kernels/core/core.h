// The core library's own parts: the table of loaded algorithms, the cache of packed weights, and one call of an
// algorithm.
#pragma once

#include <ai3/kernel.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace ai3 {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Not asked of PyTorch where it is so already, as every question goes through the dispatcher.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  // Not by a stream, nor by STD_TORCH_CHECK, which uses one: where another libstdc++ is in the process, streams crash.
  const auto text = [](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      return std::to_string(part);
    } else {
      return std::string(part);
    }
  };
  throw std::runtime_error((std::string() + ... + text(parts)));
}

// Raises RuntimeError in Python, with the parts behind the condition as its text.
#define AI3_CHECK(condition, ...)               \
  do {                                          \
    if (!(condition)) ::ai3::fail(__VA_ARGS__); \
  } while (false)

// A call into PyTorch, which has said already what is wrong if it fails.
#define AI3_CALL(call) AI3_CHECK((call) == TORCH_SUCCESS, "PyTorch refused " #call)

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, FreeDeleter>;

// 64-byte aligned, as kernel.h promises for packed weights, plans and workspace.
Buffer allocate(size_t bytes);

struct LoadedKernel {
  const ai3_kernel* table;
  std::string label;  // "ai3::conv2d[winograd@cpp]", shown by torch.profiler
  bool is_cuda;       // else it runs on the CPU
};

// The loaded algorithm of this id; asks Python to load it the first time, since a compiled graph names only ids.
const LoadedKernel& find_kernel(int64_t id);

// The weight of one call as its algorithm wants it. `keep` owns whatever the pointers point to.
struct PreparedWeight {
  const void* weight;  // contiguous, batch norm folded in
  const void* bias;
  const void* packed;
  const void *prologue_scale, *prologue_shift;
  std::shared_ptr<void> keep;
};

// Batch norm in inference: y = (x - mean) * weight / sqrt(var + eps) + bias.
struct BatchNorm {
  OptionalTensor weight, bias, mean, var;
  double eps;
};

struct WeightSource {
  const Tensor& weight;
  const OptionalTensor& bias;  // contiguous
  const BatchNorm* norm;       // null without one
  const BatchNorm* prologue;   // of the input, null without one
  bool
      is_static;  // a parameter outside of training: packed once. In training it changes every step, so nothing is kept
  bool makes_bias = false;  // the bias is no longer the one given: something is folded into it, or it is cast
};

PreparedWeight prepare_weight(const LoadedKernel& kernel, int64_t id, const ai3_args& args, const WeightSource& source);

// Tables computed once a shape.
std::shared_ptr<void> prepare_plan(const LoadedKernel& kernel, int64_t id, const ai3_args& args);

ai3_dtype dtype_of(const Tensor& t);

// While one is there, the operations of this thread run on it alone, as its neighbours have work of their own; and no
// gradients are recorded, as the caller of the thread would have it.
class OneThread {
 public:
  OneThread();
  ~OneThread();
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  bool alone_before_, gradients_before_;
};

// Runs one image operation: brings the input to a layout the algorithm takes, allocates the output in the layout asked
// for, and applies what the algorithm leaves of the epilogue. `args` holds the window; `weight` is null without one.
Tensor run_image(int64_t id, ai3_args args, const Tensor& input, int64_t out_channels, int64_t out_h, int64_t out_w,
                 bool channels_last, const WeightSource* weight, const OptionalTensor& residual);

// The same into the channels of `image`, [N,channels,H,W] in channels_last, from `channel` on; what is beside them
// stays. Adds to what is there, before the activation, where asked to.
void run_image_into(const char* op, int64_t id, ai3_args args, const Tensor& input, const Tensor& image,
                    int64_t channel, int64_t out_channels, int64_t out_h, int64_t out_w, const WeightSource* weight,
                    bool adds = false);

// A convolution and the largest of each 2x2 pixels behind it, in channels_last: by `id` alone where that can, else by
// `pool` what `id` gives.
Tensor run_pooled(int64_t id, int64_t pool, ai3_args args, const Tensor& input, int64_t out_channels, int64_t out_h,
                  int64_t out_w, const WeightSource& weight);

// Some elements of a tensor as they lie, from `offset` of its own first one on.
template <typename Sizes, typename Strides>
Tensor view_from(const Tensor& of, int64_t offset, const Sizes& sizes, const Strides& strides) {
  AtenTensorHandle made = nullptr;
  AI3_CALL(aoti_torch__reinterpret_tensor(of.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                          offset, &made));
  return Tensor(made);
}

// Whether a tensor's memory is an image in this layout.
bool image_is(const Tensor& t, bool channels_last);

// A tensor whose memory is an image in this layout: itself where it is one already.
Tensor image_as(const Tensor& t, bool channels_last);

// As algorithms take it, of what is an image in this layout.
ai3_tensor image_view(const Tensor& t, bool channels_last, bool writable);

// An image [N,C,H,W] like `like` of another size, or [C,H,W], which is always contiguous.
Tensor empty_image(const Tensor& like, const std::array<int64_t, 4>& sizes, bool channels_last);

struct Argument;
struct Step;
using Values = std::vector<OptionalTensor>;  // of a program: sequence.h

// An operation of a program.
struct Operation {
  std::string_view name;
  bool (*accepts)(const std::vector<Argument>& arguments);
  void (*call)(const Step& step, Values& values, int64_t batch);
  // Bits of the arguments that are images, where each image of a batch is computed from its own alone; 0 where not.
  uint32_t images;
  uint64_t static_weight = 0;  // which argument says that the packed weight is kept; 0 where none does
  uint64_t batch = 0;          // which argument is the size of the batch, negative for what follows; 0 where none is
  bool computes = true;        // from its images, and is not merely a place for them

  bool is_image(size_t argument) const { return (images >> argument & 1) != 0; }
};

// Null for a name that is none of the operations.
const Operation* find_operation(std::string_view name);

// The operations that have files of their own.
Tensor max_pool2d(const Tensor& input, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                  int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, bool ceil_mode,
                  int64_t algorithm, bool channels_last);
void max_pool2d_into(const Tensor& output, int64_t channel, const Tensor& input, int64_t kernel_h, int64_t kernel_w,
                     int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                     int64_t dilation_w, bool ceil_mode, int64_t algorithm);
Tensor avg_pool2d(const Tensor& input, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                  int64_t pad_h, int64_t pad_w, bool ceil_mode, bool count_include_pad, int64_t divisor_override,
                  int64_t algorithm, bool channels_last);
void avg_pool2d_into(const Tensor& output, int64_t channel, const Tensor& input, int64_t kernel_h, int64_t kernel_w,
                     int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, bool ceil_mode,
                     bool count_include_pad, int64_t divisor_override, int64_t algorithm);
Tensor adaptive_avg_pool2d(const Tensor& input, int64_t out_h, int64_t out_w, int64_t algorithm, bool channels_last);
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
                 const OptionalTensor& mask, double scale, bool is_causal, bool masked_is_zero, int64_t algorithm);

// Throws, naming the tensor, where it has another dtype or device than the input.
void check_like(const char* op, const char* what, const Tensor& input, const OptionalTensor& other);

// Throws where the input is no image, with its batch or without.
void check_image(const char* op, const Tensor& input);

inline int64_t channels_of(const Tensor& t) { return t.size(t.dim() - 3); }
inline int64_t height_of(const Tensor& t) { return t.size(t.dim() - 2); }
inline int64_t width_of(const Tensor& t) { return t.size(t.dim() - 1); }

// A tensor as algorithms take it, with its own strides.
ai3_tensor any_view(const Tensor& t);

// Runs an operation whose input and output are ready in args.
void run_ready(const LoadedKernel& kernel, int64_t id, ai3_args args);

// Throws, naming the algorithm, where it cannot compute these arguments.
void check_supported(const LoadedKernel& kernel, const ai3_args& args);

}  // namespace ai3
