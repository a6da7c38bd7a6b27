// GEMM on tensor cores, of float32 as TF32 or, strictly, 3xTF32; few rows divide the depth among more blocks.
// Source: ai3/gemm_tile.cuh, with the rows of the input for its pixels.
#ifdef __CUDACC__

#include <ai3/gemm_kernels.cuh>

#else

#define AI3_CODE_IN_PARTS
#include <ai3/gemm_host.cuh>

namespace {

const char* supports(const ai3_args* a) {
  if (a->dtype == AI3_OTHER) return "needs a floating-point type";
  if (a->sm < 80) return "needs compute capability 8.0";
  constexpr int64_t kMost = int64_t(1) << 30;
  if (a->input.size[0] >= kMost || a->input.size[1] >= kMost || a->output.size[1] >= kMost)
    return "has 2^30 rows or columns";
  return nullptr;
}

ai3::GemmShape shape(const ai3_args* a) {
  return {.args = a,
          .rows = a->input.size[0],
          .columns = a->output.size[1],
          .channels = a->input.size[1],
          .kernel_h = 1,
          .kernel_w = 1,
          .groups = 1,
          .in_pixel = a->input.size[1],
          .out_pixel = a->output.size[1],
          .has_window = false};
}

double cost(const ai3_args* a) { return ai3::gemm_cost(shape(a)); }
size_t packed_bytes(const ai3_args* a) { return ai3::gemm_packed_bytes(shape(a)); }
void pack(const ai3_args* a, void* dst) { ai3::gemm_pack(shape(a), dst); }
void run(const ai3_args* a) { ai3::run_gemm(shape(a)); }

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "linear",
                           .algorithm = "gemm",
                           .version = 1,
                           .flags = AI3_EPILOGUE,
                           .supports = supports,
                           .cost = cost,
                           .packed_bytes = packed_bytes,
                           .pack = pack,
                           .pack_variant = ai3::gemm_pack_variant,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }

#endif
