// The cache of plans: tables that an algorithm computes once a shape.
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "core.h"

namespace ai3 {
namespace {

struct PlanKey {
  int64_t values[24];
  bool operator==(const PlanKey& other) const { return std::memcmp(values, other.values, sizeof values) == 0; }
};

struct PlanHash {
  size_t operator()(const PlanKey& key) const {
    uint64_t h = 1469598103934665603ull;
    for (int64_t v : key.values) h = (h ^ static_cast<uint64_t>(v)) * 1099511628211ull;
    return h;
  }
};

// Enough for every layer of a large network; beyond it, as with image sizes that never repeat, the table starts anew.
constexpr size_t kMaxPlanBytes = size_t{128} << 20;
size_t plan_bytes_held = 0;
std::mutex plan_mutex;
std::unordered_map<PlanKey, std::shared_ptr<void>, PlanHash>& plans() {
  static auto* map = new std::unordered_map<PlanKey, std::shared_ptr<void>, PlanHash>();
  return *map;
}

}  // namespace

std::shared_ptr<void> prepare_plan(const LoadedKernel& kernel, int64_t id, const ai3_args& a) {
  if (kernel.table->plan_bytes == nullptr) return nullptr;
  // Every field a plan may depend on; the batch size is not one.
  const PlanKey key{{id,
                     a.dtype,
                     a.input.size[1],
                     a.input.size[2],
                     a.input.size[3],
                     a.output.size[1],
                     a.output.size[2],
                     a.output.size[3],
                     a.kernel_h,
                     a.kernel_w,
                     a.stride_h,
                     a.stride_w,
                     a.dilation_h,
                     a.dilation_w,
                     a.pad_top,
                     a.pad_bottom,
                     a.pad_left,
                     a.pad_right,
                     a.groups,
                     a.ceil_mode,
                     a.count_include_pad,
                     a.divisor_override,
                     a.input.stride[1],
                     a.input.stride[3]}};
  std::lock_guard lock(plan_mutex);
  auto found = plans().find(key);
  if (found != plans().end()) return found->second;
  const size_t bytes = kernel.table->plan_bytes(&a);
  std::shared_ptr<void> plan;
  if (bytes > 0) {
    plan = std::shared_ptr<void>(allocate(bytes).release(), FreeDeleter());
    kernel.table->make_plan(&a, plan.get());
  }
  const size_t counted = bytes + sizeof(PlanKey);
  if (plan_bytes_held + counted > kMaxPlanBytes) {
    plans().clear();
    plan_bytes_held = 0;
  }
  plan_bytes_held += counted;
  plans().emplace(key, plan);
  return plan;
}

}  // namespace ai3
