// What a .cu file is written with. It is compiled twice: for the GPU by NVRTC, which sees what is inside
// `#ifdef __CUDACC__`, and for the host by the C++ compiler, which sees the rest: the table, and who launches what.
#ifndef AI3_CUDA_H
#define AI3_CUDA_H

#ifdef __CUDACC__

#ifdef __CUDACC_RTC__  // nvcc has them already
using int64_t = long long;
using uint64_t = unsigned long long;
using int32_t = int;
using uint32_t = unsigned int;
#endif

// A kernel that the host launches by its name, with one struct of parameters.
#define AI3_KERNEL(threads, name, Params) \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Params p)
#define AI3_KERNEL_BLOCKS(threads, blocks, name, Params) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)

#else

#include <ai3/kernel.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <utility>

// The few functions of the driver that load and launch: declared here, so that no CUDA header is needed.
namespace ai3::cuda {

struct Driver {
  using Handle = void*;
  int (*library_load)(Handle* library, const void* code, void*, void**, unsigned, void*, void**, unsigned);
  int (*library_kernel)(Handle* kernel, Handle library, const char* name);
  int (*kernel_attribute)(int attribute, int value, Handle kernel, int device);
  int (*launch)(Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                unsigned shared, void* stream, void** params, void** extra);
  int (*error_name)(int error, const char** name);

  // Null where there is no driver.
  static const Driver* get() {
    static const Driver driver;
    return driver.launch == nullptr ? nullptr : &driver;
  }

 private:
  Driver() : library_load{}, library_kernel{}, kernel_attribute{}, launch{}, error_name{} {
    void* lib = dlopen("libcuda.so.1", RTLD_NOW);
    if (lib == nullptr) return;
    library_load = reinterpret_cast<decltype(library_load)>(dlsym(lib, "cuLibraryLoadData"));
    library_kernel = reinterpret_cast<decltype(library_kernel)>(dlsym(lib, "cuLibraryGetKernel"));
    kernel_attribute = reinterpret_cast<decltype(kernel_attribute)>(dlsym(lib, "cuKernelSetAttribute"));
    error_name = reinterpret_cast<decltype(error_name)>(dlsym(lib, "cuGetErrorName"));
    if (library_load == nullptr || library_kernel == nullptr || kernel_attribute == nullptr) return;
    launch = reinterpret_cast<decltype(launch)>(dlsym(lib, "cuLaunchKernel"));
  }
};

// The device code of this file, by compute capability; what it launches, by device.
class Code {
 public:
  static Code& get() {
    static Code* code = new Code();
    return *code;
  }

  void add(int sm, std::string image) {
    const std::lock_guard lock(mutex_);
    images_.try_emplace(sm, std::move(image));
  }

  // Null, with the reason in `error`, where it cannot be loaded.
  void* kernel(const ai3_args* args, const char* name, unsigned shared, std::string& error) {
    const std::lock_guard lock(mutex_);
    Loaded& loaded = kernels_[{args->device, name}];
    if (loaded.kernel != nullptr && shared <= loaded.shared) return loaded.kernel;
    const Driver* driver = Driver::get();
    if (driver == nullptr) return error = "the driver libcuda.so.1 cannot be loaded", nullptr;
    void* kernel = nullptr;
    void*& library = libraries_[args->sm];
    const auto image = images_.find(args->sm);
    if (image == images_.end()) return error = "it is not compiled for this GPU", nullptr;
    if (library == nullptr &&
        failed(driver->library_load(&library, image->second.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
               "loading its device code", error)) {
      return nullptr;
    }
    if (failed(driver->library_kernel(&kernel, library, name), name, error)) return nullptr;
    // More than that of dynamic shared memory must be asked for.
    constexpr unsigned kShared = 48 * 1024;
    constexpr int kMaxDynamicSharedSize = 8;
    if (shared > kShared &&
        failed(driver->kernel_attribute(kMaxDynamicSharedSize, static_cast<int>(shared), kernel, args->device),
               "its shared memory", error)) {
      return nullptr;
    }
    loaded = {kernel, shared > kShared ? shared : kShared};
    return kernel;
  }

  static bool failed(int result, const char* what, std::string& error) {
    if (result == 0) return false;
    const char* name = nullptr;
    if (const Driver* driver = Driver::get(); driver->error_name != nullptr) driver->error_name(result, &name);
    error = std::string(what) + ": " + (name == nullptr ? "CUDA error " + std::to_string(result) : name);
    return true;
  }

 private:
  std::mutex mutex_;
  std::map<int, std::string> images_;
  std::map<int, void*> libraries_;
  struct Loaded {
    void* kernel;
    unsigned shared;  // dynamic bytes that it may be launched with
  };
  std::map<std::pair<int, std::string>, Loaded> kernels_;
};

struct Grid {
  int64_t x, y = 1, z = 1;
};

// Launches a kernel of this file on the call's stream; a failure is the call's.
template <typename Params>
bool launch(const ai3_args* args, const char* name, Grid grid, unsigned threads, unsigned shared,
            const Params& params) {
  std::string error;
  if (void* kernel = Code::get().kernel(args, name, shared, error)) {
    void* values[] = {const_cast<Params*>(&params)};
    const int result =
        Driver::get()->launch(kernel, static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                              static_cast<unsigned>(grid.z), threads, 1, 1, shared, args->stream, values, nullptr);
    if (!Code::failed(result, name, error)) return true;
  }
  args->runtime->fail(args->runtime, error.c_str());
  return false;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace ai3::cuda

// Hands over the device code for one compute capability, as the cubin that NVRTC made.
extern "C" AI3_EXPORT inline __attribute__((used)) void ai3_set_device_code(int sm, const void* code, uint64_t bytes) {
  ai3::cuda::Code::get().add(sm, std::string(static_cast<const char*>(code), bytes));
}

#endif
#endif
