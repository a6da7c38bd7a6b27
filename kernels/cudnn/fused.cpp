// guess and auto: convolutions by fused plans of the graph API, and the plans that were stored for them.
#include "fused.h"

#include <cstdio>
#include <map>

#include "support.h"

namespace ai3::cudnn {
namespace {

Cache<FusedPlan>& cache() {
  static Cache<FusedPlan>* cache = new Cache<FusedPlan>();
  return *cache;
}

// What search() found, by the problem's text.
struct Stored {
  std::mutex mutex;
  std::map<std::string, std::string> plans;
  std::string message;

  static Stored& get() {
    static Stored* stored = new Stored();
    return *stored;
  }
};

FusedPlan stored_or_guessed(const Problem& p) {
  Stored& stored = Stored::get();
  const std::string key = text_of(p);
  std::string text;
  {
    const std::lock_guard lock(stored.mutex);
    const auto it = stored.plans.find(key);
    if (it != stored.plans.end()) text = it->second;
  }
  if (!text.empty()) {
    try {
      return read_plan(p, text);
    } catch (const std::exception& error) {
      set_message("the stored plan of " + key + " " + error.what());
    }
  }
  return guess(p);
}

FusedPlan make(const Problem& p) {
  FusedPlan plan;
  try {
    const OnDevice device(static_cast<int>(p.device));
    const OutsideCapture outside;
    return p.algorithm == int64_t(Choice::kAuto) ? stored_or_guessed(p) : guess(p);
  } catch (const std::exception& error) {
    plan.reason = error.what();
  }
  return plan;
}

const char* outside(const Problem& p) { return p.dtype == AI3_OTHER ? "needs a float dtype" : nullptr; }

}  // namespace

void set_message(const std::string& message) {
  Stored& stored = Stored::get();
  const std::lock_guard lock(stored.mutex);
  stored.message = message;
}

std::string text_of(const Problem& p) {
  char gpu[256] = "";
  Driver::get().cuDeviceGetName(gpu, sizeof gpu, static_cast<int>(p.device));
  std::string text = "cudnn " + std::to_string(Api::get().GetVersion()) + " on " + gpu;
  const auto add = [&text](const char* name, const int64_t* values, int count) {
    text += std::string(" ") + name;
    for (int i = 0; i < count; ++i) text += (i == 0 ? "=" : ",") + std::to_string(values[i]);
  };
  add("sm", &p.sm, 1);
  add("dtype", &p.dtype, 1);
  add("strict", &p.strict, 1);
  add("deterministic", &p.deterministic, 1);
  add("max_workspace", &p.max_workspace, 1);
  add("x", p.x, 4);
  add("x_stride", p.x_stride, 4);
  add("w", p.w, 4);
  add("w_stride", p.w_stride, 4);
  add("y", p.y, 4);
  add("y_stride", p.y_stride, 4);
  add("stride", p.stride, 2);
  add("dilation", p.dilation, 2);
  add("before", p.pad_before, 2);
  add("after", p.pad_after, 2);
  add("groups", &p.groups, 1);
  add("bias", &p.has_bias, 1);
  add("residual", &p.has_residual, 1);
  add("residual_stride", p.residual_stride, 4);
  add("activation", &p.activation, 1);
  add("alignment", p.alignment, 5);
  return text;
}

const char* plan_supports(const ai3_args* a, Choice choice) {
  Problem p(a, kForward, int64_t(choice));
  if (const char* reason = outside(p); reason != nullptr || p.is_empty()) return reason;
  if (cache().get(p, make).is_apart) p = without_rest(p);
  const FusedPlan& plan = cache().get(p, make);
  return plan.reason.empty() ? nullptr : plan.reason.c_str();
}

int32_t plan_fuses(const ai3_args* a, Choice choice) {
  const Problem p(a, kForward, int64_t(choice));
  return p.is_empty() || !cache().get(p, make).is_apart ? 1 : 0;
}

size_t plan_workspace_bytes(const ai3_args* a, Choice choice) {
  const Problem p(a, kForward, int64_t(choice));
  return p.is_empty() ? 0 : static_cast<size_t>(cache().get_again(p, make).workspace());
}

void plan_run(const ai3_args* a, Choice choice) {
  try {
    const FusedPlan& plan = cache().get_again(Problem(a, kForward, int64_t(choice)), make);
    if (!plan.reason.empty()) throw Failure(plan.reason);
    if (plan.is_apart) throw Failure("cannot apply this residual and activation");
    const OnDevice device(a->device);
    plan.run(a);
  } catch (const std::exception& error) {
    a->runtime->fail(a->runtime, error.what());
  }
}

}  // namespace ai3::cudnn

using namespace ai3::cudnn;

namespace {

int64_t copy_out(const std::string& text, char* out, int64_t size) {
  if (size > 0) std::snprintf(out, static_cast<size_t>(size), "%s", text.c_str());
  return static_cast<int64_t>(text.size()) + 1;
}

}  // namespace

// Each answers the bytes it needs, its closing zero among them, whatever `size` is.

extern "C" AI3_EXPORT int64_t ai3_cudnn_key(const ai3_args* args, char* out, int64_t size) {
  try {
    return copy_out(text_of(Problem(args, kForward, int64_t(Choice::kAuto))), out, size);
  } catch (const std::exception& error) {
    set_message(error.what());
    return 0;
  }
}

// What the last failure was.
extern "C" AI3_EXPORT int64_t ai3_cudnn_message(char* out, int64_t size) {
  Stored& stored = Stored::get();
  const std::lock_guard lock(stored.mutex);
  return copy_out(stored.message, out, size);
}

// `auto` takes this plan where its problem has this key, from its next call on; what cannot be read then is passed over
// with a message.
extern "C" AI3_EXPORT void ai3_cudnn_set_plan(const char* key, const char* plan) {
  Stored& stored = Stored::get();
  {
    const std::lock_guard lock(stored.mutex);
    stored.plans[key] = plan;
  }
  cache().drop([key](const Problem& p) { return p.algorithm == int64_t(Choice::kAuto) && text_of(p) == key; });
  const std::string text = plan;
  if (text.rfind(kApart, 0) != 0) return;
  const size_t begin = std::string(kApart).size(), end = text.find('\n', begin);
  if (end != std::string::npos) ai3_cudnn_set_plan(text.substr(begin, end - begin).c_str(), plan + end + 1);
}
