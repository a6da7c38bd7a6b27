// cuBLASLt's product of matrices, with bias, residual and the activations that it has in its epilogue.
// Source: the cuBLASLt API, https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api.
#include "ai3/cublaslt.h"

namespace {

ai3::cublaslt::Product product_of(const ai3_args* a) {
  const int64_t depth = a->weight.size[1], columns = a->weight.size[0];
  return {a->input.size[0], columns, depth, depth, columns};
}

const char* supports(const ai3_args* a) {
  if (a->dtype == AI3_OTHER) return "needs a floating-point dtype";
  return a->weight.size[1] > 0 ? nullptr : "needs input features";
}

double cost(const ai3_args* a) { return ai3::cublaslt::cost(a, product_of(a)); }
size_t workspace_bytes(const ai3_args* a) { return ai3::cublaslt::workspace_bytes(a, product_of(a)); }
int32_t fuses(const ai3_args* a) { return ai3::cublaslt::fuses(a); }
void run(const ai3_args* a) { ai3::cublaslt::run(a, product_of(a)); }

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "linear",
                           .algorithm = "gemm",
                           .version = 1,
                           .flags = AI3_EPILOGUE,
                           .supports = supports,
                           .cost = cost,
                           .workspace_bytes = workspace_bytes,
                           .fuses = fuses,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
