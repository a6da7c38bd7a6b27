// Plans of the graph API: what cuDNN's heuristics recommend, without what the problem forbids.
#include <algorithm>
#include <array>
#include <utility>

#include "fused.h"

namespace ai3::cudnn {
namespace {

template <typename Note>
bool has(const std::vector<Note>& notes, Note note) {
  return std::find(notes.begin(), notes.end(), note) != notes.end();
}

// The notes of an engine decide whether it keeps to what the problem asks for.
//   strict float32: no tensor cores and no inputs rounded to less (cuDNN recommends TF32 engines first, whatever
//     PyTorch's settings are). Nor kernels compiled at run time, which took ten times as long as its others (H200,
//     cuDNN 9.19) and a second to make, but for depthwise. Winograd and FFT stay, whose errors in float32 are of some
//     1e-5 and 1e-7, but not Winograd by tiles of 13x13, which errs by 5e-3
//   float16 and bfloat16: neither Winograd nor FFT, whose transforms lose more in these than the products do; nor sums
//     in less than float32
//   deterministic: the note itself
bool is_allowed(const Problem& p, const std::vector<cudnnBackendNumericalNote_t>& notes,
                const std::vector<cudnnBackendBehaviorNote_t>& behavior) {
  if (p.deterministic != 0 && has(notes, CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC)) return false;
  if (has(notes, CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION)) return false;
  if (has(notes, CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_13x13)) return false;
  if (p.strict != 0) {
    return !has(notes, CUDNN_NUMERICAL_NOTE_TENSOR_CORE) && !has(notes, CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS) &&
           (is_depthwise(p) || !has(behavior, CUDNN_BEHAVIOR_NOTE_RUNTIME_COMPILATION));
  }
  if (p.dtype != AI3_FLOAT16 && p.dtype != AI3_BFLOAT16) return true;
  return !has(notes, CUDNN_NUMERICAL_NOTE_WINOGRAD) && !has(notes, CUDNN_NUMERICAL_NOTE_FFT);
}

std::string name_of(const Descriptor& config, const Descriptor& engine) {
  int64_t index = -1;
  engine.get(CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1, &index);
  std::string name = "eng" + std::to_string(index);
  std::vector<Descriptor> knobs;
  std::vector<cudnnBackendDescriptor_t> raw;
  for (int i = 0; i < CUDNN_KNOB_TYPE_COUNTS; ++i) {
    knobs.emplace_back(CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR);
    raw.push_back(knobs.back().raw());
  }
  const int64_t count =
      config.get(CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, CUDNN_TYPE_BACKEND_DESCRIPTOR, CUDNN_KNOB_TYPE_COUNTS, raw.data());
  for (int64_t i = 0; i < count; ++i) {
    cudnnBackendKnobType_t type{};
    int64_t value = 0;
    knobs[i].get(CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, CUDNN_TYPE_KNOB_TYPE, 1, &type);
    knobs[i].get(CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, CUDNN_TYPE_INT64, 1, &value);
    name += "_k" + std::to_string(static_cast<int>(type)) + "=" + std::to_string(value);
  }
  return name;
}

// A stored plan begins with a line of these, the name of its part and, if it is, that it is compiled; its JSON follows.
constexpr char kFormat[] = "ai3-cudnn-2 ", kCompiled[] = " compiled";
constexpr std::pair<const char*, Part> kParts[] = {
    {"all", Part::kAll}, {"generic", Part::kGeneric}, {"convolution", Part::kConvolution}};

// The first step that cuDNN can make, without a reason; or null.
std::shared_ptr<const Step> first_step(const Problem& p, Part part, cudnnHandle_t handle, std::string& reason) {
  try {
    const Graph graph = make_graph(p, part, handle);
    for (const cudnnBackendHeurMode_t mode : {CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_B, CUDNN_HEUR_MODE_FALLBACK}) {
      for (const Candidate& candidate : candidates(p, graph, mode)) {
        // In strict float32 an FFT may be first that takes thrice as long: cuDNN ranks it with tensor cores in mind.
        if (candidate.transforms) continue;
        try {
          auto step = std::make_shared<const Step>(graph, candidate, handle);
          if (p.max_workspace < 0 || step->workspace <= p.max_workspace) {
            reason.clear();
            return step;
          }
          reason = "every plan of cuDNN's needs a larger workspace than allowed";
        } catch (const Failure& error) {
          if (reason.empty()) reason = error.what();
        }
      }
    }
    if (reason.empty()) reason = "cuDNN offers no plan for it on this GPU";
  } catch (const Failure& error) {
    reason = error.what();
  }
  return nullptr;
}

}  // namespace

std::vector<Candidate> candidates(const Problem& p, const Graph& graph, cudnnBackendHeurMode_t mode) {
  std::vector<Candidate> found;
  Descriptor heuristics(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph.operations)
      .set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
  {
    // cuDNN's own frontend keeps threads apart here.
    static std::mutex* one_at_a_time = new std::mutex();
    const std::lock_guard lock(*one_at_a_time);
    if (Api::get().BackendFinalize(heuristics.raw()) != CUDNN_STATUS_SUCCESS) return found;
  }
  const int64_t count = heuristics.get(CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 0, nullptr);
  std::vector<Descriptor> configs;
  std::vector<cudnnBackendDescriptor_t> raw;
  for (int64_t i = 0; i < count; ++i) {
    configs.emplace_back(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    raw.push_back(configs.back().raw());
  }
  const int64_t filled =
      heuristics.get(CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, count, raw.data());
  for (int64_t i = 0; i < filled; ++i) {
    const Descriptor engine(CUDNN_BACKEND_ENGINE_DESCRIPTOR);
    cudnnBackendDescriptor_t raw_engine = engine.raw();
    configs[i].get(CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &raw_engine);
    std::vector<cudnnBackendNumericalNote_t> notes(CUDNN_NUMERICAL_NOTE_TYPE_COUNT);
    notes.resize(engine.get(CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE,
                            CUDNN_NUMERICAL_NOTE_TYPE_COUNT, notes.data()));
    std::vector<cudnnBackendBehaviorNote_t> behavior(CUDNN_BEHAVIOR_NOTE_TYPE_COUNT);
    behavior.resize(engine.get(CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE, CUDNN_TYPE_BEHAVIOR_NOTE,
                               CUDNN_BEHAVIOR_NOTE_TYPE_COUNT, behavior.data()));
    if (!is_allowed(p, notes, behavior)) continue;
    const bool is_winograd = has(notes, CUDNN_NUMERICAL_NOTE_WINOGRAD), is_fft = has(notes, CUDNN_NUMERICAL_NOTE_FFT);
    std::string name = name_of(configs[i], engine) + (is_winograd ? " winograd" : is_fft ? " fft" : "");
    found.push_back({std::move(configs[i]), std::move(name), is_winograd || is_fft,
                     has(behavior, CUDNN_BEHAVIOR_NOTE_RUNTIME_COMPILATION)});
  }
  return found;
}

Step::Step(const Graph& graph, const Candidate& candidate, cudnnHandle_t handle)
    : plan(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR),
      ids(graph.ids),
      is_compiled(candidate.is_compiled),
      name(candidate.name) {
  plan.set_handle(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, handle)
      .set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, candidate.config)
      .finalize();
  plan.get(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &workspace);
}

Step::Step(const Graph& graph, const std::string& json, bool compiled, cudnnHandle_t handle)
    : plan(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR), ids(graph.ids), is_compiled(compiled), name("stored") {
  plan.set_handle(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, handle)
      .set(CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, static_cast<int64_t>(json.size()),
           json.data())
      .finalize();
  plan.get(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &workspace);
}

std::string Step::json() const {
  const int64_t size = plan.get(CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, 0, nullptr);
  std::string text(static_cast<size_t>(size), '\0');
  plan.get(CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, size, text.data());
  return text;
}

void Step::run(cudnnHandle_t handle, const Pointers& pointers, void* workspace_memory) const {
  std::array<void*, kTensorIds> data{};
  for (size_t i = 0; i < ids.size(); ++i) data[i] = pointers.of[ids[i]];
  const int64_t count = static_cast<int64_t>(ids.size());
  Descriptor pack(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
  pack.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, count, ids.data())
      .set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, count, data.data())
      .set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace_memory)
      .finalize();
  check(Api::get().BackendExecute(handle, plan.raw(), pack.raw()), "running a plan");
}

void FusedPlan::run(const ai3_args* a) const {
  static const float three = 3, sixth = 1.0f / 6;
  static const double three64 = 3, sixth64 = 1.0 / 6;
  const auto scalar = [a](const float& single, const double& twice) {
    return a->dtype == AI3_FLOAT64 ? static_cast<void*>(const_cast<double*>(&twice)) : const_cast<float*>(&single);
  };
  Pointers pointers{};
  pointers.of[kX] = a->input.data;
  pointers.of[kW] = const_cast<void*>(a->packed != nullptr ? a->packed : a->weight.data);
  pointers.of[kY] = a->output.data;
  pointers.of[kBias] = const_cast<void*>(a->bias);
  pointers.of[kResidual] = a->residual.data;
  pointers.of[kThree] = scalar(three, three64);
  pointers.of[kSixth] = scalar(sixth, sixth64);
  const cudnnHandle_t handle = handle_on(a->device);
  check(Api::get().SetStream(handle, static_cast<cudaStream_t>(a->stream)), "cudnnSetStream");
  const std::lock_guard lock(*mutex);
  Separated separated(a->stream, a->device, step->is_compiled);
  step->run(handle, pointers, a->workspace);
  separated.end();
  if (adds_bias) add_bias(handle, a->dtype, bias, a->bias, y, a->output.data);
}

bool has_rest(const Problem& p) { return p.has_residual != 0 || p.activation != AI3_IDENTITY; }

Problem without_rest(const Problem& p) {
  Problem plain = p;
  plain.has_residual = 0;
  plain.activation = AI3_IDENTITY;
  std::fill(plain.residual_stride, plain.residual_stride + 4, 0);
  plain.alignment[4] = kMostAlignment;
  return plain;
}

FusedPlan plan_of(const Problem& p, Part part, std::shared_ptr<const Step> step) {
  FusedPlan plan;
  plan.step = std::move(step);
  plan.part = part;
  plan.adds_bias = part == Part::kConvolution && p.has_bias != 0;
  if (plan.adds_bias) {
    plan.bias.set_channels(p);
    plan.y.set(data_type(p.dtype), p.y, p.y_stride);
  }
  return plan;
}

bool is_depthwise(const Problem& p) { return p.groups > 1 && p.w[1] == 1; }

// For depthwise convolutions with a bias, cuDNN's list holds kernels that take several times as long as all others.
FusedPlan guess(const Problem& p) {
  const cudnnHandle_t handle = handle_on(static_cast<int>(p.device));
  const bool depthwise = is_depthwise(p);
  std::string reason;
  const auto first = [&](Part part) {
    if (auto step = first_step(p, part, handle, reason)) return plan_of(p, part, std::move(step));
    FusedPlan none;
    none.reason = reason;
    return none;
  };
  FusedPlan plan = first(depthwise ? Part::kGeneric : Part::kAll);
  if (plan.reason.empty()) return plan;
  if (has_rest(p)) {
    FusedPlan apart;
    apart.is_apart = true;
    return apart;
  }
  plan = first(Part::kConvolution);
  if (!plan.reason.empty() && depthwise) plan = first(Part::kAll);
  return plan;
}

FusedPlan read_plan(const Problem& p, const std::string& text) {
  if (text.rfind(kApart, 0) == 0) {
    FusedPlan plan;
    plan.is_apart = true;
    return plan;
  }
  const cudnnHandle_t handle = handle_on(static_cast<int>(p.device));
  const size_t end = text.find('\n');
  for (const auto& [name, part] : kParts) {
    for (const bool is_compiled : {false, true}) {
      if (text.substr(0, end) != std::string(kFormat) + name + (is_compiled ? kCompiled : "")) continue;
      const std::string json = text.substr(end + 1);
      return plan_of(p, part, std::make_shared<const Step>(make_graph(p, part, handle), json, is_compiled, handle));
    }
  }
  throw Failure("it is of another format");
}

std::string write_plan(const FusedPlan& plan) {
  for (const auto& [name, part] : kParts) {
    if (part == plan.part)
      return std::string(kFormat) + name + (plan.step->is_compiled ? kCompiled : "") + "\n" + plan.step->json();
  }
  return "";
}

}  // namespace ai3::cudnn
