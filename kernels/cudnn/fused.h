// What fused.cpp, plans.cpp and search.cpp share.
#ifndef AI3_CUDNN_FUSED_H
#define AI3_CUDNN_FUSED_H

#include <string>

#include "graph.h"

namespace ai3::cudnn {

// A stored plan that begins so leaves residual and activation to the core library: the text of the problem without them
// follows in a line, and then its plan.
constexpr const char* kApart = "ai3-cudnn-2 apart\n";

// Names a problem between processes: cuDNN's version, the GPU, and all that the plan depends on.
std::string text_of(const Problem& problem);
// What ai3_cudnn_message() gives.
void set_message(const std::string& message);

}  // namespace ai3::cudnn
#endif
