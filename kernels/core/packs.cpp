// The cache of packed weights and of plans. A stale pack is a wrong answer, so an entry is used only while its weight
// is the same storage, unchanged by its version counter, with no optimizer step in between (fused ones raise no
// version). What else was folded in is compared by value: batch norm updates its statistics without raising their
// versions.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "core.h"

namespace ai3 {
namespace {

std::atomic<int64_t> epoch{0};
std::atomic<int64_t> packs_made{0};

int64_t call_int(const char* op, const Tensor& t) {
  StableIValue stack[1] = {torch::stable::detail::from(t)};
  AI3_CALL(torch_call_dispatcher(op, "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<int64_t>(stack[0]);
}

bool is_inference(const Tensor& t) {
  StableIValue stack[1] = {torch::stable::detail::from(t)};
  AI3_CALL(torch_call_dispatcher("aten::is_inference", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

// Shares the storage, not the tensor: the address cannot be reused while an entry lives, yet the weight can die.
Tensor alias_of(const Tensor& t) {
  StableIValue stack[1] = {torch::stable::detail::from(t)};
  AI3_CALL(torch_call_dispatcher("aten::detach", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Has Python drop the entries of this weight when the weight is gone.
void watch(const Tensor& weight) {
  StableIValue stack[1] = {torch::stable::detail::from(weight)};
  AI3_CALL(torch_call_dispatcher("ai3::_watch_weight", "", stack, TORCH_ABI_VERSION));
}

struct Entry {
  int64_t id, variant, epoch, version;
  std::vector<int64_t> sizes, strides;  // of the weight: a view of the same storage is another weight
  std::vector<char> folded;             // the values of bias and batch norms that were folded in
  std::optional<Tensor> source;         // an alias of the weight
  std::optional<Tensor> weight, bias;
  Buffer packed, prologue;  // prologue: scales and shifts
};

std::mutex mutex;
std::unordered_map<const void*, std::list<std::shared_ptr<Entry>>>& packs() {
  static auto* map = new std::unordered_map<const void*, std::list<std::shared_ptr<Entry>>>();
  return *map;
}

// A batch norm as scale * x + shift, in double, so that it adds no error of its own beyond one rounding of each.
struct Affine {
  double scale, shift;
};
template <typename T>
Affine affine_of(const BatchNorm& norm, int64_t channel, double bias) {
  auto value = [channel](const OptionalTensor& t, double otherwise) {
    return t ? static_cast<double>(static_cast<const T*>(t->const_data_ptr())[channel]) : otherwise;
  };
  const double scale = value(norm.weight, 1) / std::sqrt(value(norm.var, 1) + norm.eps);
  return {scale, (bias - value(norm.mean, 0)) * scale + value(norm.bias, 0)};
}

template <typename T>
Buffer prologue_of(const BatchNorm& norm) {
  const int64_t channels = norm.mean->numel();
  Buffer buffer = allocate(static_cast<size_t>(2 * channels) * sizeof(T));
  T* scale = static_cast<T*>(buffer.get());
  for (int64_t c = 0; c < channels; ++c) {
    const Affine affine = affine_of<T>(norm, c, 0);
    scale[c] = static_cast<T>(affine.scale);
    scale[channels + c] = static_cast<T>(affine.shift);
  }
  return buffer;
}

template <typename T>
void fold(const Tensor& weight, const OptionalTensor& bias, const BatchNorm& norm, Tensor& out_weight,
          Tensor& out_bias) {
  const int64_t channels = weight.size(0);
  const int64_t inner = channels == 0 ? 0 : weight.numel() / channels;
  const T* w = static_cast<const T*>(weight.const_data_ptr());
  T* ow = static_cast<T*>(out_weight.mutable_data_ptr());
  T* ob = static_cast<T*>(out_bias.mutable_data_ptr());
  for (int64_t k = 0; k < channels; ++k) {
    const double before = bias ? static_cast<double>(static_cast<const T*>(bias->const_data_ptr())[k]) : 0;
    const Affine affine = affine_of<T>(norm, k, before);
    for (int64_t i = 0; i < inner; ++i) ow[k * inner + i] = static_cast<T>(w[k * inner + i] * affine.scale);
    ob[k] = static_cast<T>(affine.shift);
  }
}

OptionalTensor contiguous_or_none(const OptionalTensor& t) {
  return t ? OptionalTensor(as_contiguous(*t)) : std::nullopt;
}

// Visits the bytes of everything that is folded into the weight or prepared with it, and a mark for what is absent.
template <typename Visit>
bool visit_folded(const WeightSource& source, Visit visit) {
  const OptionalTensor none;
  for (const BatchNorm* norm : {source.norm, source.prologue}) {
    const char given = norm != nullptr;
    if (!visit(&given, 1)) return false;
    if (norm == nullptr) continue;
    if (!visit(reinterpret_cast<const char*>(&norm->eps), sizeof norm->eps)) return false;
    for (const OptionalTensor* t :
         {norm == source.norm ? &source.bias : &none, &norm->weight, &norm->bias, &norm->mean, &norm->var}) {
      const char present = t->has_value();
      if (!visit(&present, 1)) return false;
      if (present && !visit(static_cast<const char*>((*t)->const_data_ptr()), (*t)->numel() * (*t)->element_size())) {
        return false;
      }
    }
  }
  return true;
}

bool same_folded(const WeightSource& source, const std::vector<char>& folded) {
  size_t at = 0;
  return visit_folded(source,
                      [&](const char* bytes, size_t count) {
                        if (folded.size() - at < count || std::memcmp(folded.data() + at, bytes, count) != 0)
                          return false;
                        at += count;
                        return true;
                      }) &&
         at == folded.size();
}

std::shared_ptr<Entry> make_entry(const LoadedKernel& kernel, const ai3_args& args, const WeightSource& source) {
  auto entry = std::make_shared<Entry>();
  entry->weight = torch::stable::contiguous(source.weight);
  entry->bias = source.bias;
  if (source.norm != nullptr) {
    Tensor weight = torch::stable::empty_like(*entry->weight);
    Tensor bias = torch::stable::new_empty(weight, {weight.size(0)});
    (args.dtype == AI3_FLOAT64 ? fold<double> : fold<float>)(*entry->weight, entry->bias, *source.norm, weight, bias);
    entry->weight = weight;
    entry->bias = bias;
  }
  if (source.prologue != nullptr) {
    entry->prologue = (args.dtype == AI3_FLOAT64 ? prologue_of<double> : prologue_of<float>)(*source.prologue);
  }
  ai3_args shaped = args;
  shaped.weight.data = const_cast<void*>(entry->weight->const_data_ptr());
  const ai3_kernel* table = kernel.table;
  const size_t bytes = table->packed_bytes == nullptr ? 0 : table->packed_bytes(&shaped);
  if (bytes > 0) {
    entry->packed = allocate(bytes);
    table->pack(&shaped, entry->packed.get());
    packs_made.fetch_add(1, std::memory_order_relaxed);
  }
  return entry;
}

PreparedWeight prepared(std::shared_ptr<Entry> entry, const ai3_args& args, const WeightSource& source) {
  PreparedWeight result{};
  if (entry->weight) result.weight = entry->weight->const_data_ptr();
  // Without batch norm the bias is read live: it is small, and then needs no check.
  const OptionalTensor& bias = source.norm != nullptr ? entry->bias : source.bias;
  if (bias) result.bias = bias->const_data_ptr();
  result.packed = entry->packed.get();
  if (source.prologue != nullptr) {
    const int64_t bytes = source.prologue->mean->numel() * (args.dtype == AI3_FLOAT64 ? 8 : 4);
    result.prologue_scale = entry->prologue.get();
    result.prologue_shift = static_cast<const char*>(entry->prologue.get()) + bytes;
  }
  result.keep = std::move(entry);
  return result;
}

}  // namespace

PreparedWeight prepare_weight(const LoadedKernel& kernel, int64_t id, const ai3_args& args, const WeightSource& given) {
  AI3_CHECK(given.weight.numel() > 0 && given.weight.const_data_ptr() != nullptr, kernel.label,
            ": the weight is empty, or its storage was freed");
  const bool packs_weight = kernel.table->packed_bytes != nullptr && kernel.table->packed_bytes(&args) > 0;
  if (given.norm == nullptr && given.prologue == nullptr && !packs_weight && given.weight.is_contiguous()) {
    PreparedWeight result{};
    result.weight = given.weight.const_data_ptr();
    if (given.bias) result.bias = given.bias->const_data_ptr();
    return result;
  }
  const auto dense = [](const BatchNorm* norm) {
    if (norm == nullptr) return BatchNorm{};
    return BatchNorm{contiguous_or_none(norm->weight), contiguous_or_none(norm->bias), contiguous_or_none(norm->mean),
                     contiguous_or_none(norm->var), norm->eps};
  };
  const BatchNorm norm = dense(given.norm), prologue = dense(given.prologue);
  const WeightSource source{given.weight, given.bias, given.norm != nullptr ? &norm : nullptr,
                            given.prologue != nullptr ? &prologue : nullptr, given.is_static};
  if (!source.is_static) return prepared(make_entry(kernel, args, source), args, source);

  const void* key = source.weight.const_data_ptr();
  const int64_t variant = kernel.table->pack_variant == nullptr ? 0 : kernel.table->pack_variant(&args);
  const int64_t now = epoch.load(std::memory_order_acquire);
  const auto sizes = source.weight.sizes();
  const auto strides = source.weight.strides();
  size_t folded_bytes = 0;
  visit_folded(source, [&](const char*, size_t count) {
    folded_bytes += count;
    return true;
  });
  auto is_of_this_weight = [&](const Entry& e) {
    return e.id == id && e.variant == variant && e.folded.size() == folded_bytes &&
           std::equal(sizes.begin(), sizes.end(), e.sizes.begin(), e.sizes.end()) &&
           std::equal(strides.begin(), strides.end(), e.strides.begin(), e.strides.end());
  };

  std::shared_ptr<Entry> found;
  {
    std::lock_guard lock(mutex);
    auto bucket = packs().find(key);
    if (bucket != packs().end()) {
      for (const auto& e : bucket->second) {
        if (is_of_this_weight(*e)) found = e;
      }
    }
  }
  if (found != nullptr && found->epoch == now && found->version == call_int("aten::_version", source.weight) &&
      same_folded(source, found->folded)) {
    return prepared(std::move(found), args, source);
  }

  auto entry = make_entry(kernel, args, source);
  // An inference tensor has no version counter, so a change of it could not be seen.
  if (is_inference(source.weight)) return prepared(std::move(entry), args, source);
  entry->id = id;
  entry->variant = variant;
  entry->epoch = now;
  entry->version = call_int("aten::_version", source.weight);
  entry->sizes.assign(sizes.begin(), sizes.end());
  entry->strides.assign(strides.begin(), strides.end());
  entry->source = alias_of(source.weight);
  visit_folded(source, [&](const char* bytes, size_t count) {
    entry->folded.insert(entry->folded.end(), bytes, bytes + count);
    return true;
  });
  if (packs_weight) entry->weight.reset();  // only the packed copy is read again
  watch(source.weight);
  {
    std::lock_guard lock(mutex);
    auto& bucket = packs()[key];
    bucket.remove(found);
    bucket.push_back(entry);
  }
  return prepared(std::move(entry), args, source);
}

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

extern "C" {

// Forgets the packs of the weight at this address; of every weight for null.
AI3_EXPORT void ai3_core_drop_packs(const void* weight) {
  std::list<std::shared_ptr<ai3::Entry>> dropped;  // freed after the lock is released
  std::lock_guard lock(ai3::mutex);
  auto& map = ai3::packs();
  if (weight != nullptr) {
    auto found = map.find(weight);
    if (found == map.end()) return;
    dropped = std::move(found->second);
    map.erase(found);
    return;
  }
  for (auto& bucket : map) dropped.splice(dropped.end(), bucket.second);
  map.clear();
}

// Called after an optimizer step: what was packed before it is not used again.
AI3_EXPORT void ai3_core_raise_epoch(void) { ai3::epoch.fetch_add(1, std::memory_order_acq_rel); }

AI3_EXPORT int64_t ai3_core_packs_held(void) {
  std::lock_guard lock(ai3::mutex);
  int64_t held = 0;
  for (const auto& bucket : ai3::packs()) held += static_cast<int64_t>(bucket.second.size());
  return held;
}

AI3_EXPORT int64_t ai3_core_packs_made(void) { return ai3::packs_made.load(std::memory_order_relaxed); }
}
