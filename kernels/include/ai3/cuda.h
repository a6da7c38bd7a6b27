// What a .cu file is written with. It is compiled twice: for the GPU by NVRTC, which sees what is inside
// `#ifdef __CUDACC__`, and for the host by the C++ compiler, which sees the rest: the table, and who launches what.
#ifndef AI3_CUDA_H
#define AI3_CUDA_H

// A file whose kernels take long to compile has them in parts, one a dtype, and says so to the host by
// AI3_CODE_IN_PARTS: what a call needs is one of them. Part 0 is all.
#define AI3_PART_FLOAT16 1
#define AI3_PART_BFLOAT16 2
#define AI3_PART_TF32 3
#define AI3_PART_FLOAT32 4
#define AI3_PART_FLOAT64 5

#ifdef __CUDACC__

#ifndef AI3_PART
#define AI3_PART 0
#endif
#define AI3_HAS_PART(part) (AI3_PART == 0 || AI3_PART == (part))

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

// The part of this file's device code that a call needs.
inline int part_of([[maybe_unused]] const ai3_args* args) {
#ifdef AI3_CODE_IN_PARTS
  switch (args->dtype) {
    case AI3_FLOAT16:
      return AI3_PART_FLOAT16;
    case AI3_BFLOAT16:
      return AI3_PART_BFLOAT16;
    case AI3_FLOAT32:
      return args->allow_tf32 ? AI3_PART_TF32 : AI3_PART_FLOAT32;
    default:
      return AI3_PART_FLOAT64;
  }
#else
  return 0;
#endif
}

// The device code of this file, by compute capability and part; what it launches, by device. Code that is not there is
// asked for when it is first launched.
class Code {
 public:
  static Code& get() {
    static Code* code = new Code();
    return *code;
  }

  // Called with a compute capability and a part, it calls ai3_set_device_code().
  using Provider = void (*)(int sm, int part);
  void set_provider(Provider provider) {
    const std::lock_guard lock(mutex_);
    provider_ = provider;
  }

  void add(int sm, int part, std::string image, std::string error) {
    const std::lock_guard lock(mutex_);
    Image& to = images_[{sm, part}];
    if (to.code.empty()) to = {std::move(image), std::move(error)};
  }

  // Null, with the reason in `error`, where it cannot be loaded.
  void* kernel(const ai3_args* args, const char* name, unsigned shared, std::string& error) {
    std::unique_lock lock(mutex_);
    Loaded& loaded = kernels_[{args->device, name}];
    if (loaded.kernel != nullptr && shared <= loaded.shared) return loaded.kernel;
    const std::pair<int, int> code{args->sm, part_of(args)};
    if (images_[code].code.empty() && provider_ != nullptr) {
      const Provider provide = provider_;
      lock.unlock();
      provide(code.first, code.second);
      lock.lock();
    }
    const Image& image = images_[code];
    if (image.code.empty())
      return error = image.error.empty() ? "it is not compiled for this GPU" : image.error, nullptr;
    const Driver* driver = Driver::get();
    if (driver == nullptr) return error = "the driver libcuda.so.1 cannot be loaded", nullptr;
    void* kernel = nullptr;
    void*& library = libraries_[code];
    if (library == nullptr &&
        failed(driver->library_load(&library, image.code.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
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
  struct Image {
    std::string code, error;
  };
  Provider provider_ = nullptr;
  std::map<std::pair<int, int>, Image> images_;
  std::map<std::pair<int, int>, void*> libraries_;
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

// Who is asked for device code.
extern "C" AI3_EXPORT inline __attribute__((used)) void ai3_set_device_code_provider(
    ai3::cuda::Code::Provider provider) {
  ai3::cuda::Code::get().set_provider(provider);
}

// Hands over a part of the device code for one compute capability, as the cubin that NVRTC made; without any, why.
extern "C" AI3_EXPORT inline __attribute__((used)) void ai3_set_device_code(int sm, int part, const void* code,
                                                                            uint64_t bytes, const char* error) {
  ai3::cuda::Code::get().add(sm, part, std::string(static_cast<const char*>(code), bytes),
                             error == nullptr ? "" : error);
}

// The part that a call needs.
extern "C" AI3_EXPORT inline __attribute__((used)) int ai3_device_code_part(const ai3_args* args) {
  return ai3::cuda::part_of(args);
}

#endif
#endif
