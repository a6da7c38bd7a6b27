// Where tensors are, and what an algorithm on a GPU is told of it.
#pragma once

#include <span>

#include "core.h"

namespace ai3 {

struct Place {
  int32_t type, index;
  bool operator==(const Place&) const = default;
};
Place place_of(const Tensor& t);
std::string name_of(const Place& place);

// Fills in the dtype, and on a GPU the device, the stream and the settings. Throws where the algorithm runs elsewhere.
// `is_product`: PyTorch has settings of its own for products of matrices.
void set_device(ai3_args& args, const LoadedKernel& kernel, const Tensor& input, bool is_product = false);

// The device's current stream.
void set_stream(ai3_args& args);

// Whether what is put on the stream is recorded for a CUDA graph instead of run.
bool is_capturing(const ai3_args& args);

// While one is there, the call's GPU is the thread's current one.
class OnDevice {
 public:
  explicit OnDevice(const ai3_args& args);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  void* guard_ = nullptr;
};

// What was put on a stream so far: work on another stream waits for it, on the GPU alone.
class Mark {
 public:
  Mark() = default;
  ~Mark();
  Mark(const Mark&) = delete;
  Mark& operator=(const Mark&) = delete;

  void set(const ai3_args& args);
  void wait(const ai3_args& args) const;

 private:
  void *event_ = nullptr, *stream_ = nullptr;
};

// A tensor without its values. Where there is no memory for it the error says how much was wanted and where, so that
// Python can ask PyTorch for it again, whose own error says more.
Tensor empty_strided(const Place& place, int32_t dtype, std::span<const int64_t> sizes,
                     std::span<const int64_t> strides);
Tensor empty_contiguous(const Tensor& like, std::span<const int64_t> sizes);
Tensor empty_as(const Tensor& like);

// Memory of the call's GPU, from PyTorch's allocator.
Tensor device_bytes(const ai3_args& args, size_t bytes);

}  // namespace ai3
