#include "api.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <vector>

namespace ai3::cudnn {
namespace {

constexpr int kMaxDevices = 64;

void* find(void* library, const char* name, const char* of) {
  void* function = dlsym(library, name);
  if (function == nullptr) throw Failure(std::string(of) + " has no " + name);
  return function;
}

Api load_api() {
  void* library = dlopen("libcudnn.so.9", RTLD_NOW);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw Failure(std::string("cuDNN cannot be loaded: ") + (reason == nullptr ? "no libcudnn.so.9" : reason));
  }
  Api api;
#define AI3_CUDNN_FIND(name) api.name = reinterpret_cast<decltype(api.name)>(find(library, "cudnn" #name, "cuDNN"));
  AI3_CUDNN_FUNCTIONS(AI3_CUDNN_FIND)
#undef AI3_CUDNN_FIND
  return api;
}

Driver load_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  if (library == nullptr) throw Failure("the CUDA driver libcuda.so.1 cannot be loaded");
  Driver d{};
#define AI3_DRIVER_FIND(name) d.name = reinterpret_cast<decltype(d.name)>(find(library, #name, "the CUDA driver"))
  AI3_DRIVER_FIND(cuInit);
  AI3_DRIVER_FIND(cuGetErrorName);
  AI3_DRIVER_FIND(cuDeviceGetName);
  AI3_DRIVER_FIND(cuDevicePrimaryCtxRetain);
  AI3_DRIVER_FIND(cuCtxGetCurrent);
  AI3_DRIVER_FIND(cuCtxPushCurrent_v2);
  AI3_DRIVER_FIND(cuCtxPopCurrent_v2);
  AI3_DRIVER_FIND(cuCtxSynchronize);
  AI3_DRIVER_FIND(cuThreadExchangeStreamCaptureMode);
  AI3_DRIVER_FIND(cuMemGetInfo_v2);
  AI3_DRIVER_FIND(cuMemAlloc_v2);
  AI3_DRIVER_FIND(cuMemFree_v2);
  AI3_DRIVER_FIND(cuStreamCreate);
  AI3_DRIVER_FIND(cuStreamDestroy_v2);
  AI3_DRIVER_FIND(cuStreamSynchronize);
  AI3_DRIVER_FIND(cuStreamBeginCapture_v2);
  AI3_DRIVER_FIND(cuStreamEndCapture);
  AI3_DRIVER_FIND(cuGraphInstantiateWithFlags);
  AI3_DRIVER_FIND(cuGraphLaunch);
  AI3_DRIVER_FIND(cuGraphExecDestroy);
  AI3_DRIVER_FIND(cuGraphDestroy);
  AI3_DRIVER_FIND(cuEventCreate);
  AI3_DRIVER_FIND(cuEventDestroy_v2);
  AI3_DRIVER_FIND(cuEventRecord);
  AI3_DRIVER_FIND(cuEventElapsedTime);
  AI3_DRIVER_FIND(cuModuleLoadData);
  AI3_DRIVER_FIND(cuModuleGetFunction);
  AI3_DRIVER_FIND(cuLaunchKernel);
#undef AI3_DRIVER_FIND
  d.cuInit(0);
  return d;
}

// PyTorch's context on the device, which is never given back.
void* context_of(int device) {
  static std::atomic<void*> contexts[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) throw Failure("there is no GPU " + std::to_string(device));
  void* context = contexts[device].load(std::memory_order_acquire);
  if (context == nullptr) {
    check_cuda(Driver::get().cuDevicePrimaryCtxRetain(&context, device), "using the GPU");
    contexts[device].store(context, std::memory_order_release);
  }
  return context;
}

// A kernel that does nothing: it begins when all before it has ended, and what follows when it has. An event between
// the kernels does not keep them apart.
void* empty_kernel_on(int device) {
  static constexpr char kSource[] =
      ".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry ai3_nothing() { ret; }\n";
  static std::mutex mutex;
  static void* kernels[kMaxDevices];
  const std::lock_guard lock(mutex);
  if (kernels[device] == nullptr) {
    const OutsideCapture outside;
    void* module = nullptr;
    check_cuda(Driver::get().cuModuleLoadData(&module, kSource), "loading a kernel");
    check_cuda(Driver::get().cuModuleGetFunction(&kernels[device], module, "ai3_nothing"), "loading a kernel");
  }
  return kernels[device];
}

// Handles that no thread uses now. Neither they nor the pool are freed: CUDA may be gone when the process ends.
struct HandlePool {
  std::mutex mutex;
  std::vector<cudnnHandle_t> idle[kMaxDevices];

  static HandlePool& get() {
    static HandlePool* pool = new HandlePool();
    return *pool;
  }
};

// A handle serves one thread at a time; a thread that ends leaves its handles to others.
struct ThreadHandles {
  cudnnHandle_t handles[kMaxDevices] = {};

  ~ThreadHandles() {
    HandlePool& pool = HandlePool::get();
    const std::lock_guard lock(pool.mutex);
    for (int i = 0; i < kMaxDevices; ++i) {
      if (handles[i] != nullptr) pool.idle[i].push_back(handles[i]);
    }
  }
};

}  // namespace

const Api& Api::get() {
  static const Api api = load_api();
  return api;
}

const Driver& Driver::get() {
  static const Driver driver = load_driver();
  return driver;
}

std::string describe(cudnnStatus_t status) {
  char detail[512] = "";
  Api::get().GetLastErrorString(detail, sizeof detail);
  detail[sizeof detail - 1] = '\0';
  const std::string name = Api::get().GetErrorString(status);
  return detail[0] == '\0' ? name : name + " (" + detail + ")";
}

void check(cudnnStatus_t status, const char* what) {
  if (status != CUDNN_STATUS_SUCCESS) throw Failure(std::string(what) + ": " + describe(status));
}

void check_cuda(int error, const char* what) {
  if (error == 0) return;
  const char* name = nullptr;
  Driver::get().cuGetErrorName(error, &name);
  throw Failure(std::string(what) + ": " + (name == nullptr ? "CUDA error " + std::to_string(error) : name));
}

Separated::Separated(void* stream, int device, bool is_compiled) : edges_(stream) {
  if (edges_.is_capturing() || !is_compiled) return;
  const Driver& d = Driver::get();
  check_cuda(d.cuLaunchKernel(empty_kernel_on(device), 1, 1, 1, 1, 1, 1, 0, stream, nullptr, nullptr),
             "launching a kernel");
}

void Separated::end() { check_cuda(edges_.become(cuda::kAfterTheEnd), "changing a graph"); }

OnDevice::OnDevice(int device) {
  const Driver& driver = Driver::get();
  void *current = nullptr, *wanted = context_of(device);
  check_cuda(driver.cuCtxGetCurrent(&current), "finding the current GPU");
  if (current == wanted) return;
  check_cuda(driver.cuCtxPushCurrent_v2(wanted), "using the GPU");
  pushed_ = true;
}

OnDevice::~OnDevice() {
  void* popped = nullptr;
  if (pushed_) Driver::get().cuCtxPopCurrent_v2(&popped);
}

cudnnHandle_t handle_on(int device) {
  thread_local ThreadHandles mine;
  cudnnHandle_t& handle = mine.handles[device];
  if (handle != nullptr) return handle;
  HandlePool& pool = HandlePool::get();
  {
    const std::lock_guard lock(pool.mutex);
    std::vector<cudnnHandle_t>& idle = pool.idle[device];
    if (!idle.empty()) {
      handle = idle.back();
      idle.pop_back();
      return handle;
    }
  }
  const OutsideCapture outside;
  check(Api::get().Create(&handle), "making a cuDNN handle");
  return handle;
}

}  // namespace ai3::cudnn
