// The edges of a CUDA graph that is being captured: which of its kernels begin before those they depend on have ended.
#ifndef AI3_GRAPH_EDGES_H
#define AI3_GRAPH_EDGES_H

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace ai3::cuda {

// CUgraphEdgeData (declared here, so that no CUDA header is needed).
struct GraphEdge {
  unsigned char from_port, to_port, type, reserved[5];
};
constexpr GraphEdge kAfterTheEnd{};
// CU_GRAPH_KERNEL_NODE_PORT_LAUNCH_ORDER, CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC: once all blocks of the kernel before
// have begun. For kernels that wait by themselves, for the end of that one (griddepcontrol.wait), before they read or
// write what it may write or read.
constexpr GraphEdge kAfterTheStart{2, 0, 1, {}};

// The edges into what is put on a stream in its scope.
class EdgesInto {
 public:
  explicit EdgesInto(void* stream) : api_(Api::get()) {
    if (api_.info == nullptr) return;
    int status = 0;
    uint64_t id = 0;
    void* const* before = nullptr;
    const GraphEdge* edges = nullptr;
    size_t count = 0;
    constexpr int kCapturing = 1;
    error_ = api_.info(stream, &status, &id, &graph_, &before, &edges, &count);
    is_capturing_ = error_ == 0 && status == kCapturing;
    if (!is_capturing_) return;
    before_.assign(before, before + count);
    for (void* node : before_) {
      for (const auto& [behind, edge] : dependents(node)) known_.push_back(behind);
    }
  }

  bool is_capturing() const { return is_capturing_; }

  // Makes those of them such edges along which kernels may begin early. Gives the driver's error, 0 without one.
  int become(const GraphEdge& edge) {
    for (void* node : before_) {
      for (const auto& [behind, old] : dependents(node)) {
        constexpr unsigned char kProgrammatic = 1;
        if (old.type != kProgrammatic || std::find(known_.begin(), known_.end(), behind) != known_.end()) continue;
        note(api_.remove(graph_, &node, &behind, &old, 1));
        note(api_.add(graph_, &node, &behind, &edge, 1));
      }
    }
    return error_;
  }

 private:
  // Null with drivers older than CUDA 12.3, which know no kernels that begin early within a graph.
  struct Api {
    int (*info)(void* stream, int* status, uint64_t* id, void** graph, void* const** before, const GraphEdge** edges,
                size_t* count);
    int (*dependents)(void* node, void** dependents, GraphEdge* edges, size_t* count);
    int (*remove)(void* graph, void* const* from, void* const* to, const GraphEdge* edges, size_t count);
    int (*add)(void* graph, void* const* from, void* const* to, const GraphEdge* edges, size_t count);

    static const Api& get() {
      static const Api api = [] {
        void* driver = dlopen("libcuda.so.1", RTLD_NOW);
        Api found{};
        const auto find = [&](auto& function, const char* name) {
          if (driver != nullptr) function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(driver, name));
        };
        find(found.dependents, "cuGraphNodeGetDependentNodes_v2");
        find(found.remove, "cuGraphRemoveDependencies_v2");
        find(found.add, "cuGraphAddDependencies_v2");
        if (found.dependents && found.remove && found.add) find(found.info, "cuStreamGetCaptureInfo_v3");
        return found;
      }();
      return api;
    }
  };

  std::vector<std::pair<void*, GraphEdge>> dependents(void* node) {
    size_t count = 0;
    note(api_.dependents(node, nullptr, nullptr, &count));
    std::vector<void*> behind(count);
    std::vector<GraphEdge> edges(count);
    if (count > 0) note(api_.dependents(node, behind.data(), edges.data(), &count));
    std::vector<std::pair<void*, GraphEdge>> found;
    for (size_t i = 0; i < count; ++i) found.emplace_back(behind[i], edges[i]);
    return found;
  }
  void note(int error) { error_ = error_ == 0 ? error : error_; }

  const Api& api_;
  void* graph_ = nullptr;
  bool is_capturing_ = false;
  int error_ = 0;
  std::vector<void*> before_, known_;
};

}  // namespace ai3::cuda

#endif
