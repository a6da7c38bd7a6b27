// cuDNN's graph API: a convolution with what follows it as a graph of operations, and plans that run such a graph.
#ifndef AI3_CUDNN_GRAPH_H
#define AI3_CUDNN_GRAPH_H

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "api.h"
#include "problem.h"
#include "tensors.h"

namespace ai3::cudnn {

// A descriptor of the backend, and what is in it.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(cudnnBackendDescriptorType_t type);
  Descriptor(Descriptor&& other) noexcept;
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor();

  // These throw Failure.
  Descriptor& set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                  const void* values);
  Descriptor& set(cudnnBackendAttributeName_t name, int64_t value) { return set(name, CUDNN_TYPE_INT64, 1, &value); }
  Descriptor& set(cudnnBackendAttributeName_t name, bool value) { return set(name, CUDNN_TYPE_BOOLEAN, 1, &value); }
  Descriptor& set(cudnnBackendAttributeName_t name, cudnnDataType_t value) {
    return set(name, CUDNN_TYPE_DATA_TYPE, 1, &value);
  }
  Descriptor& set(cudnnBackendAttributeName_t name, const Descriptor& value) {
    return set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value.descriptor_);
  }
  Descriptor& set_handle(cudnnBackendAttributeName_t name, cudnnHandle_t handle) {
    return set(name, CUDNN_TYPE_HANDLE, 1, &handle);
  }
  Descriptor& finalize();

  // The values there are, up to `count` of them; 0 where the attribute has none.
  int64_t get(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count, void* values) const;

  cudnnBackendDescriptor_t raw() const { return descriptor_; }

 private:
  cudnnBackendDescriptor_t descriptor_ = nullptr;
};

// The tensors of a graph, by the numbers cuDNN knows them by: also the order of Pointers.
enum TensorId : int64_t { kX, kW, kY, kBias, kResidual, kThree, kSixth, kTensorIds };
struct Pointers {
  void* of[kTensorIds];
};

// Which part of activation(w * x + bias + residual) a graph computes. Generic: all of it, with an operation in between
// that does nothing, so that cuDNN does not see the convolution with bias and activation which it has a list of kernels
// for, but compiles one: depthwise on an H200 in 4 us instead of 50.
enum class Part { kAll, kGeneric, kConvolution };

struct Graph {
  std::vector<Descriptor> parts;  // what `operations` is made of
  Descriptor operations;
  std::vector<int64_t> ids;  // of the tensors in memory
};
// Throws where cuDNN refuses it.
Graph make_graph(const Problem& problem, Part part, cudnnHandle_t handle);

// One way of cuDNN's to run a graph.
struct Candidate {
  Descriptor config;
  std::string name;          // "eng10_k2=3": the engine and its knobs, as cuDNN's own logs have it
  bool transforms = false;   // by Winograd or FFT
  bool is_compiled = false;  // its kernels are compiled at run time
};
// In the order that cuDNN recommends; those that break what the problem asks for are left out.
std::vector<Candidate> candidates(const Problem& problem, const Graph& graph, cudnnBackendHeurMode_t mode);

// A graph ready to run.
struct Step {
  Descriptor plan;
  std::vector<int64_t> ids;
  int64_t workspace = 0;
  bool is_compiled;
  std::string name;

  // Throw where cuDNN refuses.
  Step(const Graph& graph, const Candidate& candidate, cudnnHandle_t handle);
  Step(const Graph& graph, const std::string& json, bool is_compiled, cudnnHandle_t handle);
  std::string json() const;
  void run(cudnnHandle_t handle, const Pointers& pointers, void* workspace) const;
};

// How a problem is computed.
struct FusedPlan {
  std::string reason;     // why there is no way, else empty
  bool is_apart = false;  // without residual and activation, which the core library applies; no step then
  std::shared_ptr<const Step> step;
  Part part = Part::kAll;                                              // that the step computes
  bool adds_bias = false;                                              // after the step
  TensorDescriptor bias, y;                                            // of that
  std::unique_ptr<std::mutex> mutex = std::make_unique<std::mutex>();  // not all engines let two threads run one plan

  int64_t workspace() const { return step == nullptr ? 0 : step->workspace; }
  void run(const ai3_args* args) const;
};

// Whether there is a residual or an activation, and the problem without them.
bool has_rest(const Problem& problem);
Problem without_rest(const Problem& problem);

bool is_depthwise(const Problem& problem);

// All in one step, or else the convolution and then the bias.
FusedPlan plan_of(const Problem& problem, Part part, std::shared_ptr<const Step> step);
// By cuDNN's heuristics: the first that it can make.
FusedPlan guess(const Problem& problem);
// As search() wrote it; throws where cuDNN cannot read it.
FusedPlan read_plan(const Problem& problem, const std::string& text);
std::string write_plan(const FusedPlan& plan);

}  // namespace ai3::cudnn
#endif
