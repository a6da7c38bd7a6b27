// The cache of packed weights. A stale pack is a wrong answer, so an entry is used only while its weight
// is the same storage, unchanged by its version counter, with no optimizer step in between (fused ones raise no
// version). What else was folded in is compared by value: batch norm updates its statistics without raising their
// versions. On a GPU that would wait for the device: there it is the same while it is the same memory, until Python
// says at what versions weights are (ai3_core_refresh_packs). There packs are also made anew in place, as a captured
// graph reads them where they were.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <list>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "device.h"

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

// What an entry of a GPU is made anew from, and its memory.
struct OfDevice {
  const LoadedKernel* kernel;
  ai3_args args;
  Tensor weight;  // aliases
  OptionalTensor bias;
  std::optional<BatchNorm> norm, prologue;
  bool makes_bias;
  std::vector<int64_t> versions;  // of all of these, as Python said last: an alias need not have its tensor's
  std::optional<Tensor> packed, scale_and_shift;
  Mark made;  // when all of that is there
  std::mutex refilling;
};

struct Entry {
  int64_t id, variant, epoch, version;
  ai3_dtype dtype;                      // that the weight is read in
  std::vector<int64_t> sizes, strides;  // of the weight: a view of the same storage is another weight
  std::vector<char> folded;             // the values of bias and batch norms that were folded in
  std::optional<Tensor> source;         // an alias of the weight
  std::optional<Tensor> weight, bias;
  Buffer packed, prologue;           // prologue: scales and shifts
  std::unique_ptr<OfDevice> device;  // null on the CPU
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

// Visits the bytes of everything that is folded into the weight or prepared with it, on a GPU its address, and a mark
// for what is absent.
template <typename Visit>
bool visit_folded(const WeightSource& source, Visit visit) {
  const auto visit_tensor = [&visit](const OptionalTensor& t) {
    const char present = t.has_value();
    if (!visit(&present, 1)) return false;
    if (!present) return true;
    const void* data = t->const_data_ptr();
    return t->is_cpu() ? visit(static_cast<const char*>(data), t->numel() * t->element_size())
                       : visit(reinterpret_cast<const char*>(&data), sizeof data);
  };
  if (source.makes_bias && !visit_tensor(source.bias)) return false;
  for (const BatchNorm* norm : {source.norm, source.prologue}) {
    const char given = norm != nullptr;
    if (!visit(&given, 1)) return false;
    if (norm == nullptr) continue;
    if (!visit(reinterpret_cast<const char*>(&norm->eps), sizeof norm->eps)) return false;
    for (const OptionalTensor* t : {&norm->weight, &norm->bias, &norm->mean, &norm->var}) {
      if (!visit_tensor(*t)) return false;
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

// Folded in double by PyTorch, through Python: once a weight.
std::pair<Tensor, Tensor> fold_on_device(const Tensor& weight, const OptionalTensor& bias, const BatchNorm& norm) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue stack[] = {from(weight),     from(bias),      from(norm.weight), from(norm.bias),
                          from(*norm.mean), from(*norm.var), from(norm.eps)};
  AI3_CALL(torch_call_dispatcher("ai3::_fold", "", stack, TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// In the type that the kernel reads, likewise.
Tensor cast_on_device(const Tensor& parameter, ai3_dtype dtype) {
  if (dtype_of(parameter) == dtype) return parameter;
  StableIValue stack[] = {torch::stable::detail::from(parameter), torch::stable::detail::from(int64_t{dtype})};
  AI3_CALL(torch_call_dispatcher("ai3::_cast", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Of a prologue, likewise: the scales, then the shifts.
Tensor scale_and_shift_of(const BatchNorm& norm) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(norm.weight), from(norm.bias), from(*norm.mean), from(*norm.var), from(norm.eps)};
  AI3_CALL(torch_call_dispatcher("ai3::_scale_and_shift", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The addresses of a graph's weights, and the version that each is at.
using Versions = std::unordered_map<const void*, int64_t>;

std::vector<int64_t> versions_of(const OfDevice& of, const Versions& given) {
  std::vector<int64_t> versions;
  const auto add = [&](const OptionalTensor& t) {
    if (!t) return;
    const auto found = given.find(t->const_data_ptr());
    versions.push_back(found == given.end() ? -1 : found->second);
  };
  add(of.weight);
  if (of.makes_bias) add(of.bias);
  for (const std::optional<BatchNorm>* norm : {&of.norm, &of.prologue}) {
    if (!*norm) continue;
    for (const OptionalTensor* t : {&(*norm)->weight, &(*norm)->bias, &(*norm)->mean, &(*norm)->var}) add(*t);
  }
  return versions;
}

// Makes what a GPU's entry holds, where it lies already.
void fill_on_device(Entry& entry) {
  OfDevice& of = *entry.device;
  const OnDevice guard(of.args);
  entry.weight = as_contiguous(of.weight);
  OptionalTensor bias = of.bias;
  if (of.norm) std::tie(entry.weight, bias) = fold_on_device(*entry.weight, of.bias, *of.norm);
  entry.weight = cast_on_device(*entry.weight, of.args.dtype);
  if (of.makes_bias) {
    if (entry.bias) {
      torch::stable::copy_(*entry.bias, *bias);
    } else {
      entry.bias = cast_on_device(*bias, of.args.dtype);
    }
  }
  if (of.prologue) {
    const Tensor made = scale_and_shift_of(*of.prologue);
    if (of.scale_and_shift) {
      torch::stable::copy_(*of.scale_and_shift, made);
    } else {
      of.scale_and_shift = made;
    }
  }
  const ai3_kernel* table = of.kernel->table;
  ai3_args shaped = of.args;
  shaped.weight.data = const_cast<void*>(entry.weight->const_data_ptr());
  const size_t bytes = table->packed_bytes == nullptr ? 0 : table->packed_bytes(&shaped);
  if (bytes > 0) {
    std::string failure;
    struct Runtime : ai3_runtime {
      std::string* failure;
    } runtime{
        {0, nullptr,
         [](const ai3_runtime* self, const char* message) { *static_cast<const Runtime*>(self)->failure = message; }},
        &failure};
    shaped.runtime = &runtime;
    if (!of.packed) of.packed = device_bytes(shaped, bytes);
    table->pack(&shaped, of.packed->mutable_data_ptr());
    AI3_CHECK(failure.empty(), of.kernel->label, ": packing the weight: ", failure);
    packs_made.fetch_add(1, std::memory_order_relaxed);
    entry.weight.reset();  // only the packed copy is read again
  } else if (of.norm || entry.weight->const_data_ptr() != of.weight.const_data_ptr()) {
    if (of.packed) {
      torch::stable::copy_(*of.packed, *entry.weight);
    } else {
      of.packed = entry.weight;
    }
    entry.weight = of.packed;
  }
  of.made.set(of.args);
}

// Makes an entry anew that is of another version of the weight, or epoch, or of other versions of what is folded in,
// where these are known: of several threads that find it stale, one does.
void refill(Entry& entry, int64_t now, int64_t version, const std::vector<int64_t>* versions) {
  OfDevice& of = *entry.device;
  const std::lock_guard lock(of.refilling);
  if (entry.epoch == now && entry.version == version && (versions == nullptr || of.versions == *versions)) return;
  set_stream(of.args);
  fill_on_device(entry);
  entry.epoch = now;
  entry.version = version;
  of.versions = versions == nullptr ? std::vector<int64_t>() : *versions;
}

std::shared_ptr<Entry> make_entry_on_device(const LoadedKernel& kernel, const ai3_args& args,
                                            const WeightSource& source) {
  auto entry = std::make_shared<Entry>();
  const auto alias = [](const OptionalTensor& t) { return t ? OptionalTensor(alias_of(*t)) : std::nullopt; };
  const auto aliases = [&alias](const BatchNorm* n) {
    return n == nullptr
               ? std::nullopt
               : std::optional(BatchNorm{alias(n->weight), alias(n->bias), alias(n->mean), alias(n->var), n->eps});
  };
  entry->device.reset(new OfDevice{.kernel = &kernel,
                                   .args = args,
                                   .weight = alias_of(source.weight),
                                   .bias = alias(source.bias),
                                   .norm = aliases(source.norm),
                                   .prologue = aliases(source.prologue),
                                   .makes_bias = source.makes_bias});
  fill_on_device(*entry);
  return entry;
}

std::shared_ptr<Entry> make_entry(const LoadedKernel& kernel, const ai3_args& args, const WeightSource& source) {
  if (kernel.is_cuda) return make_entry_on_device(kernel, args, source);
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
  // As it was given the bias is read live: it is small, and then needs no check.
  const OptionalTensor& bias = source.makes_bias ? entry->bias : source.bias;
  if (bias) result.bias = bias->const_data_ptr();
  if (entry->device != nullptr) {
    const OnDevice guard(args);
    entry->device->made.wait(args);
  }
  result.packed = entry->packed.get();
  if (entry->device != nullptr && !entry->weight) result.packed = entry->device->packed->const_data_ptr();
  if (source.prologue != nullptr) {
    const int64_t bytes = source.prologue->mean->numel() * (args.dtype == AI3_FLOAT64 ? 8 : 4);
    result.prologue_scale =
        entry->device == nullptr ? entry->prologue.get() : entry->device->scale_and_shift->const_data_ptr();
    result.prologue_shift = static_cast<const char*>(result.prologue_scale) + bytes;
  }
  result.keep = std::move(entry);
  return result;
}

}  // namespace

PreparedWeight prepare_weight(const LoadedKernel& kernel, int64_t id, const ai3_args& args, const WeightSource& given) {
  AI3_CHECK(given.weight.numel() > 0 && given.weight.const_data_ptr() != nullptr, kernel.label,
            ": the weight is empty, or its storage was freed");
  const bool packs_weight = kernel.table->packed_bytes != nullptr && kernel.table->packed_bytes(&args) > 0;
  const bool casts_bias = given.bias && dtype_of(*given.bias) != args.dtype;
  if (given.norm == nullptr && given.prologue == nullptr && !packs_weight && given.weight.is_contiguous() &&
      dtype_of(given.weight) == args.dtype && !casts_bias) {
    PreparedWeight result{};
    result.weight = given.weight.const_data_ptr();
    if (given.bias) result.bias = given.bias->const_data_ptr();
    return result;
  }
  const auto dense = [&kernel](const BatchNorm* norm) {
    if (norm == nullptr) return BatchNorm{};
    if (kernel.is_cuda) return *norm;  // PyTorch folds it, and a copy would not follow
    return BatchNorm{contiguous_or_none(norm->weight), contiguous_or_none(norm->bias), contiguous_or_none(norm->mean),
                     contiguous_or_none(norm->var), norm->eps};
  };
  const BatchNorm norm = dense(given.norm), prologue = dense(given.prologue);
  const WeightSource source{given.weight,
                            given.bias,
                            given.norm != nullptr ? &norm : nullptr,
                            given.prologue != nullptr ? &prologue : nullptr,
                            given.is_static,
                            given.norm != nullptr || casts_bias};
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
    return e.id == id && e.variant == variant && e.dtype == args.dtype && e.folded.size() == folded_bytes &&
           std::equal(sizes.begin(), sizes.end(), e.sizes.begin(), e.sizes.end()) &&
           std::equal(strides.begin(), strides.end(), e.strides.begin(), e.strides.end());
  };

  std::shared_ptr<Entry> found;
  {
    std::lock_guard lock(mutex);
    auto bucket = packs().find(key);
    if (bucket != packs().end()) {
      for (const auto& e : bucket->second) {
        // A GPU's is made anew from the tensors it was made of: for others there is another.
        if (is_of_this_weight(*e) && (e->device == nullptr || same_folded(source, e->folded))) found = e;
      }
    }
  }
  if (found != nullptr && found->epoch == now && found->version == call_int("aten::_version", source.weight) &&
      same_folded(source, found->folded)) {
    return prepared(std::move(found), args, source);
  }

  // An inference tensor has no version counter, so a change of it could not be seen. What is made while a graph is
  // captured is made at every replay.
  const bool keeps = !is_inference(source.weight) && !is_capturing(args);
  if (found != nullptr && found->device != nullptr && keeps) {
    refill(*found, now, call_int("aten::_version", source.weight), nullptr);
    return prepared(std::move(found), args, source);
  }
  auto entry = make_entry(kernel, args, source);
  if (!keeps) return prepared(std::move(entry), args, source);
  entry->id = id;
  entry->variant = variant;
  entry->dtype = args.dtype;
  entry->epoch = now;
  entry->version = call_int("aten::_version", source.weight);
  entry->sizes.assign(sizes.begin(), sizes.end());
  entry->strides.assign(strides.begin(), strides.end());
  entry->source = alias_of(source.weight);
  visit_folded(source, [&](const char* bytes, size_t count) {
    entry->folded.insert(entry->folded.end(), bytes, bytes + count);
    return true;
  });
  if (packs_weight && entry->device == nullptr) entry->weight.reset();  // only the packed copy is read again
  watch(source.weight);
  {
    std::lock_guard lock(mutex);
    auto& bucket = packs()[key];
    bucket.remove(found);
    bucket.push_back(entry);
  }
  return prepared(std::move(entry), args, source);
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

// Makes anew, where they lie, those packs of GPUs whose weights, or what was folded into them, are not at the versions
// given with their addresses, or are of an epoch that is over. A graph that was captured does not look by itself.
AI3_EXPORT const char* ai3_core_refresh_packs(const void* const* addresses, const int64_t* versions, int64_t count) {
  thread_local std::string failure;
  ai3::Versions given;
  for (int64_t i = 0; i < count; ++i) given.emplace(addresses[i], versions[i]);
  std::vector<std::shared_ptr<ai3::Entry>> entries;
  {
    std::lock_guard lock(ai3::mutex);
    for (const auto& [address, version] : given) {
      const auto bucket = ai3::packs().find(address);
      if (bucket == ai3::packs().end()) continue;
      for (const auto& entry : bucket->second) {
        if (entry->device != nullptr) entries.push_back(entry);
      }
    }
  }
  try {
    const int64_t now = ai3::epoch.load(std::memory_order_acquire);
    for (const auto& entry : entries) {
      const std::vector<int64_t> found = ai3::versions_of(*entry->device, given);
      ai3::refill(*entry, now, found[0], &found);
    }
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
  return nullptr;
}

AI3_EXPORT int64_t ai3_core_packs_held(void) {
  std::lock_guard lock(ai3::mutex);
  int64_t held = 0;
  for (const auto& bucket : ai3::packs()) held += static_cast<int64_t>(bucket.second.size());
  return held;
}

AI3_EXPORT int64_t ai3_core_packs_made(void) { return ai3::packs_made.load(std::memory_order_relaxed); }
}
