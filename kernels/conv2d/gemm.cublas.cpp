// A 1x1 convolution on channels_last images as cuBLASLt's product of its pixels with the weight, read as they lie.
// Source: the cuBLASLt API, https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api.
#include "ai3/cublaslt.h"

namespace {

ai3::cublaslt::Product product_of(const ai3_args* a) {
  const int64_t pixels = a->output.size[0] * a->output.size[2] * a->output.size[3];
  return {pixels, a->weight.size[0], a->weight.size[1], a->input.stride[3], a->output.stride[3]};
}

const char* supports(const ai3_args* a) {
  if (a->dtype == AI3_OTHER) return "needs a floating-point dtype";
  if (a->kernel_h != 1 || a->kernel_w != 1) return "needs a 1x1 kernel";
  if (a->stride_h != 1 || a->stride_w != 1) return "needs a 1x1 kernel with stride 1";
  if (a->pad_top != 0 || a->pad_bottom != 0 || a->pad_left != 0 || a->pad_right != 0)
    return "needs a 1x1 kernel without padding";
  return a->groups == 1 ? nullptr : "needs one group";
}

double cost(const ai3_args* a) { return ai3::cublaslt::cost(a, product_of(a)); }
size_t workspace_bytes(const ai3_args* a) { return ai3::cublaslt::workspace_bytes(a, product_of(a)); }
int32_t fuses(const ai3_args* a) { return ai3::cublaslt::fuses(a); }
void run(const ai3_args* a) { ai3::cublaslt::run(a, product_of(a)); }

const ai3_kernel kernel = {.abi_version = AI3_ABI_VERSION,
                           .operation = "conv2d",
                           .algorithm = "gemm",
                           .version = 1,
                           .flags = AI3_NHWC | AI3_EPILOGUE | AI3_STRIDED_OUTPUT | AI3_STRIDED_INPUT,
                           .supports = supports,
                           .cost = cost,
                           .workspace_bytes = workspace_bytes,
                           .fuses = fuses,
                           .run = run};

}  // namespace

extern "C" AI3_EXPORT const ai3_kernel* ai3_get_kernel(void) { return &kernel; }
