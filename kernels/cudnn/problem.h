// What a plan depends on, as one plain struct that is the key of the caches; and the caches.
#ifndef AI3_CUDNN_PROBLEM_H
#define AI3_CUDNN_PROBLEM_H

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "conv.h"

namespace ai3::cudnn {

// In bytes: what cuDNN's kernels ask for at most.
constexpr int64_t kMostAlignment = 16;

// The convolution y = w * x, or the gradient of x or of w; every field is of 8 bytes, so that none is between them.
struct Problem {
  int64_t operation, algorithm;
  int64_t dtype, device, sm;
  int64_t strict;  // float32 whose products may not be rounded to TF32
  int64_t deterministic, max_workspace;
  int64_t channels_last;
  int64_t x[4], x_stride[4], w[4], w_stride[4], y[4], y_stride[4], residual_stride[4];
  int64_t stride[2], dilation[2], pad_before[2], pad_after[2], groups;
  int64_t has_bias, has_residual, activation;
  int64_t alignment[5];  // of x, w, y, bias and residual

  Problem(const ai3_args* args, Operation operation, int64_t algorithm);

  bool operator==(const Problem& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
  bool is_empty() const;
  int64_t element_size() const { return dtype == AI3_FLOAT64 ? 8 : dtype == AI3_FLOAT32 ? 4 : 2; }
  double flops() const;
  // Of every tensor of the convolution, once.
  double bytes() const;
};
static_assert(std::has_unique_object_representations_v<Problem>);

// Whether a weight's taps lie between its channels in memory, so that channels_last needs a copy of it in that order.
inline bool has_own_order(const ai3_args* args) {
  return args->weight.size[1] > 1 && args->weight.size[2] * args->weight.size[3] > 1;
}
bool is_channels_last(const ai3_tensor& image);
// Of a dense [K,C,R,S] weight or [N,C,H,W] image.
void dense_strides(const int64_t* size, bool channels_last, int64_t* stride);

struct ProblemHash {
  size_t operator()(const Problem& problem) const;
};

// Plans by what they depend on. A plan is made once, by the first thread that asks, and never freed: kernels that it
// compiled may be in a captured graph.
template <typename Plan>
class Cache {
 public:
  template <typename Make>
  Plan& get(const Problem& problem, const Make& make) {
    std::shared_ptr<Entry> entry = find(problem);
    std::call_once(entry->once, [&] { entry->plan = std::make_unique<Plan>(make(problem)); });
    last() = {problem, entry->plan.get()};
    return *entry->plan;
  }

  // The plan that this thread last got, where it is the problem's: what workspace_bytes() and run() are asked of one
  // call must be the same plan, though another may have been stored meanwhile.
  template <typename Make>
  Plan& get_again(const Problem& problem, const Make& make) {
    if (last().problem == problem) return *last().plan;
    return get(problem, make);
  }

  // Makes the plans anew that `is_stale` is true of, when they are asked for again.
  template <typename Stale>
  void drop(const Stale& is_stale) {
    const std::unique_lock lock(mutex_);
    for (auto it = entries_.begin(); it != entries_.end();) {
      if (is_stale(it->first)) {
        retired_.push_back(it->second);
        it = entries_.erase(it);
      } else {
        ++it;
      }
    }
  }

 private:
  struct Entry {
    std::once_flag once;
    std::unique_ptr<Plan> plan;
  };
  struct Last {
    std::optional<Problem> problem;
    Plan* plan = nullptr;
  };

  static Last& last() {
    thread_local Last last;
    return last;
  }

  std::shared_ptr<Entry> find(const Problem& problem) {
    {
      const std::shared_lock lock(mutex_);
      const auto it = entries_.find(problem);
      if (it != entries_.end()) return it->second;
    }
    const std::unique_lock lock(mutex_);
    std::shared_ptr<Entry>& entry = entries_[problem];
    if (entry == nullptr) entry = std::make_shared<Entry>();
    return entry;
  }

  std::shared_mutex mutex_;
  std::unordered_map<Problem, std::shared_ptr<Entry>, ProblemHash> entries_;
  std::vector<std::shared_ptr<Entry>> retired_;
};

}  // namespace ai3::cudnn
#endif
