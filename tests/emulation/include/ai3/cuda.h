// Stands before ai3/cuda.h where device code is compiled by the C++ compiler: kernels are registered by name, and
// launches run them on the CPU.
#pragma once

#ifdef __CUDACC__

#include_next <ai3/cuda.h>
#undef AI3_KERNEL
#undef AI3_KERNEL_BLOCKS
#include <ai3_emulation/device.h>
#include <ai3_emulation/ptx.h>
#if __CUDA_ARCH__ >= 900
#include <ai3_emulation/hopper.h>
#endif

#define AI3_KERNEL(threads, name, Params)                                       \
  static void name(const Params p);                                             \
  static const ai3_emulation::Registered registered_##name{                     \
      {#name, unsigned(threads), sizeof(Params),                                \
       [](const void* params) { name(*static_cast<const Params*>(params)); }}}; \
  static void name(const Params p)
#define AI3_KERNEL_BLOCKS(threads, blocks, name, Params) AI3_KERNEL(threads, name, Params)

#else

#define launch launch_on_a_gpu
#define Code CodeOfAGpu
#include_next <ai3/cuda.h>
#undef Code
#undef launch

#include <ai3_emulation/runtime.h>

// What asks the driver by itself.
#define dlsym(library, name) ai3_emulation::driver_function(name)

namespace ai3::cuda {

// Its kernels are names, with the call that they are launched for.
struct Code {
  static Code& get() {
    static Code code;
    return code;
  }
  void* kernel(const ai3_args* args, const char* name, unsigned, std::string&) {
    launched = {args, ai3_get_kernel(), name};
    return &launched;
  }
  static bool failed(int result, const char* what, std::string& error) {
    if (result != 0) error = ai3_emulation::launch_error.empty() ? what : ai3_emulation::launch_error;
    return result != 0;
  }
  ai3_emulation::Launched launched;
};

template <typename Params>
bool launch(const ai3_args* args, const char* name, Grid grid, unsigned threads, unsigned shared,
            const Params& params) {
  const std::string error = ai3_emulation::launch(args, ai3_get_kernel(), name, {grid.x, grid.y, grid.z}, threads,
                                                  shared, &params, sizeof(Params));
  if (error.empty()) return true;
  args->runtime->fail(args->runtime, error.c_str());
  return false;
}

}  // namespace ai3::cuda

#endif
