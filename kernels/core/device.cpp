// Where tensors are, and what an algorithm on a GPU is told of it. PyTorch's functions for CUDA are looked up when
// first needed: this library is built against, and runs with, a PyTorch that may have none.
#include "device.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>

namespace ai3 {
namespace {

using GetStream = AOTITorchError (*)(int32_t device, void** stream);
using MakeGuard = AOTITorchError (*)(int32_t device, void** guard);
using DropGuard = AOTITorchError (*)(void* guard);
using GetAttribute = int (*)(int* value, int attribute, int device);
using IsCapturing = int (*)(void* stream, int* status);
using MakeEvent = int (*)(void** event, unsigned flags);
using RecordEvent = int (*)(void* event, void* stream);
using WaitEvent = int (*)(void* stream, void* event, unsigned flags);
using DropEvent = int (*)(void* event);

struct Cuda {
  GetStream stream = nullptr;
  MakeGuard make_guard = nullptr;
  DropGuard drop_guard = nullptr;
  GetAttribute attribute = nullptr;
  IsCapturing is_capturing = nullptr;
  MakeEvent make_event = nullptr;
  RecordEvent record_event = nullptr;
  WaitEvent wait_event = nullptr;
  DropEvent drop_event = nullptr;

  static const Cuda& get() {
    static const Cuda cuda;
    AI3_CHECK(cuda.is_there, "ai3: this PyTorch has no CUDA that could be used");
    return cuda;
  }

 private:
  bool is_there = false;

  Cuda() {
    void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
    if (torch == nullptr || driver == nullptr) return;
    stream = reinterpret_cast<GetStream>(dlsym(torch, "aoti_torch_get_current_cuda_stream"));
    make_guard = reinterpret_cast<MakeGuard>(dlsym(torch, "aoti_torch_create_cuda_guard"));
    drop_guard = reinterpret_cast<DropGuard>(dlsym(torch, "aoti_torch_delete_cuda_guard"));
    attribute = reinterpret_cast<GetAttribute>(dlsym(driver, "cuDeviceGetAttribute"));
    is_capturing = reinterpret_cast<IsCapturing>(dlsym(driver, "cuStreamIsCapturing"));
    make_event = reinterpret_cast<MakeEvent>(dlsym(driver, "cuEventCreate"));
    record_event = reinterpret_cast<RecordEvent>(dlsym(driver, "cuEventRecord"));
    wait_event = reinterpret_cast<WaitEvent>(dlsym(driver, "cuStreamWaitEvent"));
    drop_event = reinterpret_cast<DropEvent>(dlsym(driver, "cuEventDestroy_v2"));
    is_there = stream && make_guard && drop_guard && attribute && is_capturing && make_event && record_event &&
               wait_event && drop_event;
  }
};

int32_t compute_capability(int32_t device) {
  constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
  static std::array<std::atomic<int32_t>, 64> known{};
  const bool fits = static_cast<size_t>(device) < known.size();
  if (fits && known[device] != 0) return known[device];
  int major = 0, minor = 0;
  const Cuda& cuda = Cuda::get();
  AI3_CHECK(cuda.attribute(&major, kMajor, device) == 0 && cuda.attribute(&minor, kMinor, device) == 0,
            "ai3: the driver does not tell the compute capability of device ", device);
  if (fits) known[device] = 10 * major + minor;
  return 10 * major + minor;
}

[[noreturn]] void fail_for_memory(const Place& place, int64_t bytes) {
  fail("PyTorch has no memory for ", bytes, " bytes on ", name_of(place));
}

std::atomic<bool> convolutions_in_tf32{false}, products_in_tf32{false}, deterministic{false};
std::atomic<int64_t> max_workspace{-1};

}  // namespace

Place place_of(const Tensor& t) {
  Place place{};
  AI3_CALL(aoti_torch_get_device_type(t.get(), &place.type));
  AI3_CALL(aoti_torch_get_device_index(t.get(), &place.index));
  return place;
}

std::string name_of(const Place& place) {
  if (place.type == aoti_torch_device_type_cpu()) return "the CPU";
  const bool is_cuda = place.type == aoti_torch_device_type_cuda();
  return (is_cuda ? "cuda:" : "device type " + std::to_string(place.type) + ":") + std::to_string(place.index);
}

void set_device(ai3_args& args, const LoadedKernel& kernel, const Tensor& input, bool is_product) {
  args.dtype = dtype_of(input);
  args.max_workspace = -1;
  const bool is_cuda = input.is_cuda();
  AI3_CHECK(is_cuda == kernel.is_cuda, kernel.label, kernel.is_cuda ? " runs on NVIDIA GPUs" : " runs on the CPU",
            ", and its input is on ", name_of(place_of(input)));
  if (!is_cuda) return;
  args.device = input.get_device_index();
  args.sm = compute_capability(args.device);
  args.allow_tf32 = is_product ? products_in_tf32 : convolutions_in_tf32;
  args.deterministic = deterministic;
  args.max_workspace = max_workspace;
  set_stream(args);
}

void set_stream(ai3_args& args) { AI3_CALL(Cuda::get().stream(args.device, &args.stream)); }

bool is_capturing(const ai3_args& args) {
  int status = 0;
  return args.sm != 0 && Cuda::get().is_capturing(args.stream, &status) == 0 && status != 0;
}

Mark::~Mark() {
  if (event_ != nullptr) Cuda::get().drop_event(event_);
}

void Mark::set(const ai3_args& args) {
  if (is_capturing(args)) return;
  constexpr unsigned kWithoutTime = 2;
  const Cuda& cuda = Cuda::get();
  AI3_CHECK(event_ != nullptr || cuda.make_event(&event_, kWithoutTime) == 0, "ai3: the driver makes no event");
  AI3_CHECK(cuda.record_event(event_, args.stream) == 0, "ai3: the driver records no event");
  stream_ = args.stream;
}

void Mark::wait(const ai3_args& args) const {
  // A capture may not wait for what is outside of it, and begins when the device is idle.
  if (event_ == nullptr || args.stream == stream_ || is_capturing(args)) return;
  AI3_CHECK(Cuda::get().wait_event(args.stream, event_, 0) == 0, "ai3: a stream cannot wait for an event");
}

OnDevice::OnDevice(const ai3_args& args) {
  if (args.sm != 0) AI3_CALL(Cuda::get().make_guard(args.device, &guard_));
}

OnDevice::~OnDevice() {
  if (guard_ != nullptr) Cuda::get().drop_guard(guard_);
}

Tensor empty_strided(const Place& place, int32_t dtype, std::span<const int64_t> sizes,
                     std::span<const int64_t> strides) {
  // Not by torch::stable::empty, which goes through the dispatcher by name and takes as long as a small layer.
  AtenTensorHandle made = nullptr;
  const auto status = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                               place.type, place.index, &made);
  if (status != TORCH_SUCCESS) {
    int64_t elements = 1;
    for (int64_t size : sizes) elements *= size;
    fail_for_memory(place, elements * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)));
  }
  return Tensor(made);
}

Tensor empty_contiguous(const Tensor& like, std::span<const int64_t> sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  int32_t dtype = 0;
  AI3_CALL(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_strided(place_of(like), dtype, sizes, strides);
}

Tensor empty_as(const Tensor& like) {
  try {
    return torch::stable::empty_like(like);
  } catch (const std::exception&) {
    fail_for_memory(place_of(like), like.numel() * static_cast<int64_t>(like.element_size()));
  }
}

Tensor device_bytes(const ai3_args& args, size_t bytes) {
  const int64_t size = static_cast<int64_t>(bytes), stride = 1;
  return empty_strided({aoti_torch_device_type_cuda(), args.device}, aoti_torch_dtype_uint8(), {&size, 1},
                       {&stride, 1});
}

}  // namespace ai3

extern "C" {

// PyTorch's settings for its own operations on GPUs, which ai3's follow.
AI3_EXPORT void ai3_core_set_numerics(int convolutions_in_tf32, int products_in_tf32, int deterministic,
                                      int64_t max_workspace) {
  ai3::convolutions_in_tf32 = convolutions_in_tf32 != 0;
  ai3::products_in_tf32 = products_in_tf32 != 0;
  ai3::deterministic = deterministic != 0;
  ai3::max_workspace = max_workspace;
}
}
