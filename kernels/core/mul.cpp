// The product of an image with a number for each of its channels, as in squeeze and excitation: PyTorch's own takes
// as long to begin as to compute. Any other product is PyTorch's.
#include <ai3/vec.h>
#include <torch/csrc/stable/library.h>

#include "sequence.h"

namespace ai3 {
namespace {

// Channels next to each other, pixel by pixel.
bool is_image(const Tensor& t) {
  return t.dim() == 4 && t.size(1) > 1 && t.stride(1) == 1 && t.stride(3) == t.size(1) &&
         t.stride(2) == t.size(1) * t.size(3) && (t.size(0) == 1 || t.stride(0) == t.stride(2) * t.size(2)) &&
         t.numel() > 0;
}

bool scales(const Tensor& image, const Tensor& scale) {
  return is_image(image) && scale.dim() == 4 && scale.size(0) == image.size(0) && scale.size(1) == image.size(1) &&
         scale.size(2) == 1 && scale.size(3) == 1 && scale.stride(1) == 1 && scale.stride(0) == scale.size(1) &&
         scale.scalar_type() == image.scalar_type();
}

template <typename T>
struct Task {
  const T *image, *scale;
  T* out;
  int64_t channels, pixels;  // of an image

  void run(int64_t begin, int64_t end) const {
    for (int64_t p = begin; p < end; ++p) {
      const T *x = image + p * channels, *s = scale + p / pixels * channels;
      T* y = out + p * channels;
      int64_t c = 0;
      for (; c + kLanes<T> <= channels; c += kLanes<T>) store(y + c, load<Vec<T>>(x + c) * load<Vec<T>>(s + c));
      for (; c < channels; ++c) y[c] = x[c] * s[c];
    }
  }
};

template <typename T>
void multiply(const Tensor& image, const Tensor& scale, const Tensor& out) {
  constexpr int64_t kGrain = 32768;  // elements; below, a thread takes longer to start than to multiply
  const int64_t channels = image.size(1), pixels = image.size(2) * image.size(3);
  Task<T> task{static_cast<const T*>(image.const_data_ptr()), static_cast<const T*>(scale.const_data_ptr()),
               static_cast<T*>(out.mutable_data_ptr()), channels, pixels};
  AI3_CALL(torch_parallel_for(
      0, image.size(0) * pixels, (kGrain + channels - 1) / channels,
      [](int64_t begin, int64_t end, void* arg) { static_cast<const Task<T>*>(arg)->run(begin, end); }, &task));
}

}  // namespace

Tensor mul(const Tensor& a, const Tensor& b) {
  const bool first = scales(a, b);
  const ai3_dtype dtype = dtype_of(a);
  if (a.is_cpu() && (first || scales(b, a)) && (dtype == AI3_FLOAT32 || dtype == AI3_FLOAT64)) {
    const Tensor &image = first ? a : b, &scale = first ? b : a;
    Tensor out = empty_image(image, {image.size(0), image.size(1), image.size(2), image.size(3)}, true);
    (dtype == AI3_FLOAT64 ? multiply<double> : multiply<float>)(image, scale, out);
    return out;
  }
  using torch::stable::detail::from;
  StableIValue stack[] = {from(a), from(b)};
  AI3_CALL(torch_call_dispatcher("aten::mul", "Tensor", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace ai3
