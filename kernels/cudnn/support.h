// The parts that the support library's functions are made of: named algorithms (legacy.cpp) and plans (fused.cpp).
#ifndef AI3_CUDNN_SUPPORT_H
#define AI3_CUDNN_SUPPORT_H

#include "conv.h"

namespace ai3::cudnn {

const char* named_supports(const ai3_args* args, Operation operation, int algorithm);
size_t named_workspace_bytes(const ai3_args* args, Operation operation, int algorithm);
void named_run(const ai3_args* args, Operation operation, int algorithm);

const char* plan_supports(const ai3_args* args, Choice choice);
size_t plan_workspace_bytes(const ai3_args* args, Choice choice);
int32_t plan_fuses(const ai3_args* args, Choice choice);
void plan_run(const ai3_args* args, Choice choice);

double cost(const ai3_args* args, Operation operation, const Rates& rates);
size_t packed_bytes(const ai3_args* args);
void pack(const ai3_args* args, void* dst);
int64_t pack_variant(const ai3_args* args);

}  // namespace ai3::cudnn
#endif
