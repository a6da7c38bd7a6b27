// Between the C ABI and a header of the user's own: ai3_args as tensors of ai3.hpp, and their answer as the output.
#ifndef AI3_CUSTOM_ADAPTER_H
#define AI3_CUSTOM_ADAPTER_H

#include <ai3.hpp>

#include "ai3/kernel.h"

// A namespace of its own: the user's header may give any name to what it declares beside its function.
namespace ai3_adapter {

// A header counts elements in uint.
inline bool is_countable(const ai3_tensor& tensor) {
  constexpr int64_t limit = std::numeric_limits<uint>::max();
  int64_t count = 1;
  for (int32_t d = 0; d < tensor.ndim; ++d) {
    if (tensor.size[d] > limit) return false;
    if (tensor.size[d] != 0 && count > limit / tensor.size[d]) return false;
    count *= tensor.size[d];
  }
  return true;
}

// Why no header could compute this, whatever the operation; null where one could.
inline const char* refusal(const ai3_args* args) {
  if (args->dtype != AI3_FLOAT32 && args->dtype != AI3_FLOAT64) return "needs float32 or float64";
  if (!is_countable(args->input) || !is_countable(args->weight) || !is_countable(args->output))
    return "needs tensors of less than 2^32 elements";
  return nullptr;
}

// The same for an operation with a window.
inline const char* window_refusal(const ai3_args* args) {
  if (const char* reason = refusal(args)) return reason;
  if (args->pad_top != args->pad_bottom || args->pad_left != args->pad_right)
    return "needs the same padding on both sides";
  const int64_t window[] = {args->kernel_h, args->kernel_w, args->stride_h,   args->stride_w,
                            args->pad_top,  args->pad_left, args->dilation_h, args->dilation_w};
  for (const int64_t value : window)
    if (value < 0 || value > std::numeric_limits<int32_t>::max()) return "needs a window below 2^31 pixels";
  return nullptr;
}

inline ScalarType scalar_type(const ai3_args* args) {
  return args->dtype == AI3_FLOAT64 ? ScalarType::Float64 : ScalarType::Float32;
}

inline std::vector<uint> shape_of(const ai3_tensor& tensor) {
  return std::vector<uint>(tensor.size, tensor.size + tensor.ndim);
}

// A tensor over memory that stays the caller's.
inline Tensor view(const ai3_args* args, const ai3_tensor& tensor) {
  return Tensor(tensor.data, shape_of(tensor), false, scalar_type(args));
}

// [output channels or features]. Built in place: an optional<const Tensor> cannot be moved.
inline std::optional<const Tensor> bias(const ai3_args* args) {
  return args->bias == nullptr
             ? std::optional<const Tensor>()
             : std::optional<const Tensor>(std::in_place, const_cast<void*>(args->bias),
                                           std::vector<uint>{uint(args->weight.size[0])}, false, scalar_type(args));
}

// "Float [1, 2, 3]"
inline std::string describe(ScalarType type, const std::vector<uint>& shape) {
  std::string text = errs::text_of(type) + " [";
  for (size_t d = 0; d < shape.size(); ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + "]";
}

// A header may leave out a batch of 1.
inline std::vector<uint> without_leading_ones(std::vector<uint> shape) {
  shape.erase(shape.begin(), std::find_if(shape.begin(), shape.end(), [](uint size) { return size != 1; }));
  return shape;
}

// Copies what the header returned to where the output belongs; throws where it is not the output.
inline void take(const ai3_args* args, const Tensor& found) {
  const ScalarType type = scalar_type(args);
  const std::vector<uint> shape = shape_of(args->output);
  int64_t count = 1;
  for (const uint size : shape) count *= size;
  if (found.scalar_type != type || found.count() != count ||
      without_leading_ones(found.shape) != without_leading_ones(shape))
    errs::bail("returned a tensor ", describe(found.scalar_type, found.shape), ", and the output is ",
               describe(type, shape));
  if (found.data == nullptr) errs::bail("returned a tensor without data");
  if (found.data != args->output.data)
    std::memmove(args->output.data, found.data, size_t(count) * size_of_scalar_type(type));
}

// Runs the header's function for the call's dtype; nothing that it throws gets out.
template <Tensor (*in_float)(const ai3_args*), Tensor (*in_double)(const ai3_args*)>
void run(const ai3_args* args) {
  try {
    take(args, (args->dtype == AI3_FLOAT64 ? in_double : in_float)(args));
  } catch (const std::exception& error) {
    args->runtime->fail(args->runtime, error.what());
  } catch (...) {
    args->runtime->fail(args->runtime, "threw something that is not a std::exception");
  }
}

// `layouts` is AI3_NCHW for images, as headers know no other layout, and 0 for the rest.
constexpr ai3_kernel table(const char* operation, uint32_t layouts, bool is_default,
                           const char* (*supports)(const ai3_args*), void (*run)(const ai3_args*)) {
  ai3_kernel kernel{};
  kernel.abi_version = AI3_ABI_VERSION;
  kernel.operation = operation;
  kernel.algorithm = "custom";
  kernel.version = 1;
  kernel.flags = layouts | (is_default ? uint32_t(AI3_DEFAULT) : 0u);
  kernel.supports = supports;
  kernel.run = run;
  return kernel;
}

}  // namespace ai3_adapter

#endif
