// The table that the libraries of kernels/conv2d*/*.cudnn.cpp are handed.
#include "support.h"

namespace ai3::cudnn {
namespace {

const char* supports(const ai3_args* args, Method method) {
  return method.is_plan ? plan_supports(args, Choice(method.algorithm))
                        : named_supports(args, method.operation, method.algorithm);
}

size_t workspace_bytes(const ai3_args* args, Method method) {
  return method.is_plan ? plan_workspace_bytes(args, Choice(method.algorithm))
                        : named_workspace_bytes(args, method.operation, method.algorithm);
}

int32_t fuses(const ai3_args* args, Method method) { return plan_fuses(args, Choice(method.algorithm)); }

void run(const ai3_args* args, Method method) {
  method.is_plan ? plan_run(args, Choice(method.algorithm)) : named_run(args, method.operation, method.algorithm);
}

const Support kSupport = {cost, supports, workspace_bytes, fuses, run, packed_bytes, pack, pack_variant};

}  // namespace
}  // namespace ai3::cudnn

extern "C" AI3_EXPORT const void* ai3_cudnn_support() { return &ai3::cudnn::kSupport; }
