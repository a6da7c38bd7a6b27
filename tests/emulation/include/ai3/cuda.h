// Stands before ai3/cuda.h where device code is compiled by the C++ compiler: kernels are registered by name, and
// launches run them on the CPU.
#pragma once

#ifdef __CUDACC__

#include <ai3_emulation/device.h>
#include <ai3_emulation/ptx.h>

#define AI3_KERNEL(threads, name, Params)                                       \
  static void name(const Params p);                                             \
  static const ai3_emulation::Registered registered_##name{                     \
      {#name, unsigned(threads), sizeof(Params),                                \
       [](const void* params) { name(*static_cast<const Params*>(params)); }}}; \
  static void name(const Params p)
#define AI3_KERNEL_BLOCKS(threads, blocks, name, Params) AI3_KERNEL(threads, name, Params)
#define AI3_HAS_PART(part) 1

#else

#define launch launch_on_a_gpu
#include_next <ai3/cuda.h>
#undef launch

#include <ai3_emulation/runtime.h>

namespace ai3::cuda {

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
