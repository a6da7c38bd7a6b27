// A copy of an image in channels_last: of a picture with few channels, which every network begins with, by rows, as
// PyTorch's own copy goes element by element there.
#include "sequence.h"

namespace ai3 {
namespace {

template <typename T>
struct Task {
  const T* planes;
  T* pixels;
  int64_t channels, height, width;

  template <int64_t C>
  void rows(int64_t begin, int64_t end) const {
    const int64_t plane = height * width;
    for (int64_t row = begin; row < end; ++row) {
      const T* in = planes + row / height * C * plane + row % height * width;
      T* out = pixels + row * width * C;
      for (int64_t x = 0; x < width; ++x) {
#pragma GCC unroll 4
        for (int64_t c = 0; c < C; ++c) out[x * C + c] = in[c * plane + x];
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    switch (channels) {
      case 2:
        return rows<2>(begin, end);
      case 3:
        return rows<3>(begin, end);
      default:
        return rows<4>(begin, end);
    }
  }
};

template <typename T>
void interleave(const Tensor& image, const Tensor& out) {
  constexpr int64_t kGrain = 32768;  // elements; below, a thread takes longer to start than to copy
  const int64_t channels = image.size(1), height = image.size(2), width = image.size(3);
  Task<T> task{static_cast<const T*>(image.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()), channels, height,
               width};
  AI3_CALL(torch_parallel_for(
      0, image.size(0) * height, (kGrain + channels * width - 1) / (channels * width),
      [](int64_t begin, int64_t end, void* arg) { static_cast<const Task<T>*>(arg)->run(begin, end); }, &task));
}

}  // namespace

Tensor channels_last(const Tensor& image) {
  AI3_CHECK(image.dim() == 4, "ai3::sequence: channels_last of ", image.dim(), " dimensions");
  const int64_t channels = image.size(1);
  Tensor out = empty_image(image, {image.size(0), channels, image.size(2), image.size(3)}, true);
  const ai3_dtype dtype = dtype_of(image);
  const bool is_known = image.is_cpu() && (dtype == AI3_FLOAT32 || dtype == AI3_FLOAT64);
  if (is_known && 2 <= channels && channels <= 4 && image.is_contiguous() && image.numel() > 0) {
    (dtype == AI3_FLOAT64 ? interleave<double> : interleave<float>)(image, out);
  } else {
    torch::stable::copy_(out, image);
  }
  return out;
}

}  // namespace ai3
