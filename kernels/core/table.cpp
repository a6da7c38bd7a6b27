// The table of loaded algorithms, filled by Python through the C functions below.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "core.h"

namespace ai3 {
namespace {

// A panel of packed weights streams through a page of 4 KiB in less time than it takes to look the next page up.
constexpr size_t kHugePage = 2 << 20;

std::shared_mutex mutex;
// Entries are never erased: a running call may hold a reference.
std::unordered_map<int64_t, std::unique_ptr<const LoadedKernel>>& kernels() {
  static auto* map = new std::unordered_map<int64_t, std::unique_ptr<const LoadedKernel>>();
  return *map;
}

const LoadedKernel* lookup(int64_t id) {
  std::shared_lock lock(mutex);
  auto found = kernels().find(id);
  return found == kernels().end() ? nullptr : found->second.get();
}

}  // namespace

const LoadedKernel& find_kernel(int64_t id) {
  const LoadedKernel* kernel = lookup(id);
  if (kernel == nullptr) {
    StableIValue stack[1] = {torch::stable::detail::from(id)};
    AI3_CALL(torch_call_dispatcher("ai3::_load_algorithm", "", stack, TORCH_ABI_VERSION));
    kernel = lookup(id);
    AI3_CHECK(kernel != nullptr, "ai3: no algorithm has the id ", id, "; was this graph compiled by another ai3?");
  }
  return *kernel;
}

Buffer allocate(size_t bytes) {
  const bool huge = bytes >= kHugePage;
  const size_t rounded = std::max<size_t>(64, (bytes + 63) / 64 * 64);
  void* p = std::aligned_alloc(huge ? kHugePage : 64, rounded);
  AI3_CHECK(p != nullptr, "ai3: out of memory: ", bytes, " bytes");
#if defined(__linux__)
  if (huge) madvise(p, rounded, MADV_HUGEPAGE);  // a wish: where it is refused, small pages do
#endif
  return Buffer(p);
}

}  // namespace ai3

#ifndef AI3_SOURCE_DIGEST
#define AI3_SOURCE_DIGEST ""
#endif

extern "C" {

// The digest of the sources this library was built from: a stale prebuilt one is not used.
AI3_EXPORT const char* ai3_core_source_digest(void) { return AI3_SOURCE_DIGEST; }

// Null, or why the table was refused.
AI3_EXPORT const char* ai3_core_register(int64_t id, const ai3_kernel* table, const char* label, int is_cuda) {
  if (table->abi_version != AI3_ABI_VERSION) return "it was built for another version of ai3/kernel.h";
  if (table->run == nullptr || table->supports == nullptr) return "its table lacks run or supports";
  if ((table->flags & AI3_STRIDED_OUTPUT) != 0) {
    const bool convolves = std::string_view(table->operation) == "conv2d";
    const uint32_t needed = AI3_NHWC | (convolves ? AI3_EPILOGUE : 0);
    if ((table->flags & needed) != needed) return "AI3_STRIDED_OUTPUT needs AI3_NHWC, and AI3_EPILOGUE for conv2d";
  }
  if ((table->flags & AI3_STRIDED_INPUT) != 0 && (table->flags & AI3_NHWC) == 0) {
    return "AI3_STRIDED_INPUT needs AI3_NHWC";
  }
  if (table->fuses != nullptr && (table->flags & AI3_EPILOGUE) == 0) return "fuses() needs AI3_EPILOGUE";
  constexpr uint32_t epilogue = AI3_NHWC | AI3_EPILOGUE;
  if ((table->flags & AI3_RESIDUAL_IN_PLACE) != 0 && (table->flags & epilogue) != epilogue) {
    return "AI3_RESIDUAL_IN_PLACE needs AI3_NHWC and AI3_EPILOGUE";
  }
  if (table->pools != nullptr && (table->flags & epilogue) != epilogue)
    return "pools() needs AI3_NHWC and AI3_EPILOGUE";
  std::unique_lock lock(ai3::mutex);
  auto& slot = ai3::kernels()[id];
  if (slot == nullptr) slot.reset(new ai3::LoadedKernel{table, label, is_cuda != 0});
  return nullptr;
}
}
