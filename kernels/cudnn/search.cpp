// Times the plans that cuDNN recommends for a problem, on the tensors it is given. Meant for a process of its own: a
// plan that faults takes the CUDA context with it.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <set>
#include <thread>

#include "conv.h"
#include "fused.h"

namespace ai3::cudnn {
namespace {

// A stream of its own, with runs of a plan captured as one CUDA graph so that the CPU's share is not timed.
class Stopwatch {
 public:
  Stopwatch() {
    check_cuda(d_.cuStreamCreate(&stream_, 1), "making a stream");
    check_cuda(d_.cuEventCreate(&begin_, 0), "making an event");
    check_cuda(d_.cuEventCreate(&end_, 0), "making an event");
  }
  ~Stopwatch() {
    if (begin_ != nullptr) d_.cuEventDestroy_v2(begin_);
    if (end_ != nullptr) d_.cuEventDestroy_v2(end_);
    if (stream_ != nullptr) d_.cuStreamDestroy_v2(stream_);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  void* stream() const { return stream_; }
  void synchronize() const { check_cuda(d_.cuStreamSynchronize(stream_), "running a plan"); }

  // Milliseconds a run, the least of `launches` times `runs` runs.
  template <typename Run>
  float time(int runs, int launches, const Run& run) const {
    void *graph = nullptr, *executable = nullptr;
    constexpr int kThreadLocal = 1;
    check_cuda(d_.cuStreamBeginCapture_v2(stream_, kThreadLocal), "capturing a plan");
    std::string failure;
    try {
      for (int i = 0; i < runs; ++i) run();
    } catch (const Failure& error) {
      failure = error.what();
    }
    const int ended = d_.cuStreamEndCapture(stream_, &graph);
    if (!failure.empty()) throw Failure(failure);
    check_cuda(ended, "capturing a plan");
    const int made = d_.cuGraphInstantiateWithFlags(&executable, graph, 0);
    d_.cuGraphDestroy(graph);
    check_cuda(made, "capturing a plan");
    float least = INFINITY;
    int error = d_.cuGraphLaunch(executable, stream_);
    for (int i = 0; i < launches && error == 0; ++i) {
      float milliseconds = 0;
      d_.cuEventRecord(begin_, stream_);
      error = d_.cuGraphLaunch(executable, stream_);
      d_.cuEventRecord(end_, stream_);
      if (error == 0) error = d_.cuStreamSynchronize(stream_);
      if (error == 0) error = d_.cuEventElapsedTime(&milliseconds, begin_, end_);
      least = std::min(least, milliseconds / static_cast<float>(runs));
    }
    d_.cuGraphExecDestroy(executable);
    check_cuda(error, "running a plan");
    return least;
  }

 private:
  const Driver& d_ = Driver::get();
  void *stream_ = nullptr, *begin_ = nullptr, *end_ = nullptr;
};

// Grows as plans ask for more.
class Workspace {
 public:
  ~Workspace() {
    if (memory_ != nullptr) Driver::get().cuMemFree_v2(memory_);
  }
  // Null where there is no such memory.
  void* get(int64_t bytes) {
    const Driver& driver = Driver::get();
    if (bytes <= held_ && memory_ != nullptr) return memory_;
    if (memory_ != nullptr) driver.cuMemFree_v2(memory_);
    memory_ = nullptr;
    held_ = std::max<int64_t>(bytes, 1 << 20);
    if (driver.cuMemAlloc_v2(&memory_, static_cast<size_t>(held_)) != 0) memory_ = nullptr;
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  int64_t held_ = 0;
};

struct Entry {
  FusedPlan plan;
  bool is_apart;
  std::string name;
  float milliseconds;
};

// A graph that computes the problem or a part of it, what it leaves to others, and the plans for it.
struct Way {
  Problem problem;
  Part part;
  bool is_apart;  // the core library's kernel applies residual and activation
  const char* name;
  Graph graph;
};

struct Untried {
  const Way* way;
  Candidate candidate;
  std::string name;
};

std::vector<Way> ways_of(const Problem& p, bool has_epilogue, cudnnHandle_t handle) {
  std::vector<Way> ways;
  const auto add = [&](const Problem& problem, Part part, bool is_apart, const char* name) {
    try {
      ways.push_back({problem, part, is_apart, name, make_graph(problem, part, handle)});
    } catch (const Failure&) {
      // cuDNN knows no such graph
    }
  };
  const bool compiled = is_depthwise(p) && p.channels_last != 0;
  add(p, compiled ? Part::kGeneric : Part::kAll, false, compiled ? "compiled " : "fused ");
  const Problem plain = without_rest(p);
  if (has_rest(p) && has_epilogue) add(plain, Part::kAll, true, "apart ");
  // With tensor cores the fastest plans can all add the bias themselves; without, not all.
  const bool may_gain = p.strict != 0 || p.dtype == AI3_FLOAT64 || p.groups > 1;
  if (may_gain && p.has_bias != 0 && (!has_rest(p) || has_epilogue)) {
    add(plain, Part::kConvolution, has_rest(p), has_rest(p) ? "bias and rest apart " : "bias apart ");
  }
  return ways;
}

// Without doubles, those of all ways by turns.
std::vector<Untried> recommended(const std::vector<Way>& ways) {
  std::vector<Untried> found;
  std::set<std::string> names;
  for (const cudnnBackendHeurMode_t mode : {CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_B, CUDNN_HEUR_MODE_FALLBACK}) {
    std::vector<std::vector<Candidate>> lists;
    size_t longest = 0;
    for (const Way& way : ways) {
      lists.push_back(candidates(way.problem, way.graph, mode));
      longest = std::max(longest, lists.back().size());
    }
    for (size_t i = 0; i < longest; ++i) {
      for (size_t w = 0; w < ways.size(); ++w) {
        if (i >= lists[w].size()) continue;
        std::string name = ways[w].name + lists[w][i].name;
        if (names.insert(name).second) found.push_back({&ways[w], std::move(lists[w][i]), std::move(name)});
      }
    }
  }
  return found;
}

using Steps = std::vector<std::shared_ptr<const Step>>;

// The plans of some candidates, null where cuDNN recommends what it does not make for this shape. By several threads:
// cuDNN compiles some of them, which takes most of a search.
Steps steps_of(const Untried* untried, size_t count, int device) {
  Steps made(count);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    const OnDevice guard(device);
    const cudnnHandle_t handle = handle_on(device);
    for (size_t i = next++; i < count; i = next++) {
      try {
        made[i] = std::make_shared<const Step>(untried[i].way->graph, untried[i].candidate, handle);
      } catch (const Failure&) {
        // it stays null
      }
    }
  };
  std::vector<std::thread> others;
  const size_t threads = std::min<size_t>({count, 8, std::max(1u, std::thread::hardware_concurrency())});
  for (size_t t = 1; t < threads; ++t) {
    others.emplace_back([&work] {
      try {
        work();
      } catch (const Failure&) {
        // it got no handle: the others do its share
      }
    });
  }
  work();
  for (std::thread& other : others) other.join();
  return made;
}

// One call, as the core library makes it.
void run_once(const Entry& entry, const ai3_args& args, const ai3_kernel* epilogue) {
  entry.plan.run(&args);
  if (!entry.is_apart) return;
  ai3_args flat = args;
  const ai3_tensor &y = args.output, &r = args.residual;
  const int64_t elements = y.size[0] * y.size[1] * y.size[2] * y.size[3];
  flat.output = {y.data, 2, {1, elements}, {elements, 1}};
  flat.residual = {args.has_residual != 0 ? r.data : nullptr, 2, {1, elements}, {elements, 1}};
  epilogue->run(&flat);
}

}  // namespace

using Report = void (*)(int32_t index, const char* name, float milliseconds, int64_t workspace);

std::string search(const ai3_args* given, const ai3_kernel* epilogue, int most, const std::string& skip,
                   Report report) {
  const Problem p(given, kForward, int64_t(Choice::kAuto));
  const OnDevice device(given->device);
  check_cuda(Driver::get().cuCtxSynchronize(), "waiting for the tensors");
  const cudnnHandle_t handle = handle_on(given->device);
  const Stopwatch stopwatch;
  Workspace workspace;
  ai3_args args = *given;
  args.stream = stopwatch.stream();

  // Each plan of a depthwise convolution is compiled, and in MobileNet v3 none was 3 % faster than guess's (an H200).
  constexpr int kMostCompiled = 8;
  if (is_depthwise(p) && p.channels_last != 0) most = std::min(most, kMostCompiled);
  const std::vector<Way> ways = ways_of(p, epilogue != nullptr, handle);
  const std::vector<Untried> untried = recommended(ways);
  std::vector<Entry> entries;
  Steps steps;  // of the candidates from `built` on
  size_t built = 0;
  int tried = 0;
  for (size_t i = 0; i < untried.size() && tried < most; ++i) {
    const Untried& u = untried[i];
    if (i == built + steps.size()) {
      built = i;
      steps = steps_of(&u, std::min(untried.size() - i, static_cast<size_t>(most - tried)), given->device);
    }
    const std::shared_ptr<const Step>& step = steps[i - built];
    if (step == nullptr || skip.find("\n" + u.name + "\n") != std::string::npos) continue;
    Entry entry{plan_of(u.way->problem, u.way->part, step), u.way->is_apart, u.name, INFINITY};
    const int64_t bytes = entry.plan.workspace();
    if (p.max_workspace >= 0 && bytes > p.max_workspace) continue;
    args.workspace = workspace.get(bytes);
    if (args.workspace == nullptr) continue;
    ++tried;
    report(static_cast<int32_t>(i), u.name.c_str(), -1, bytes);
    const auto run = [&] { run_once(entry, args, epilogue); };
    try {
      // The clock rises while the first plan runs.
      for (int warm = 0; warm < (tried == 1 ? 20 : 1); ++warm) run();
      stopwatch.synchronize();
      entry.milliseconds = stopwatch.time(10, 1, run);
      report(static_cast<int32_t>(i), u.name.c_str(), entry.milliseconds, bytes);
      entries.push_back(std::move(entry));
    } catch (const Failure& error) {
      check_cuda(Driver::get().cuCtxSynchronize(), error.what());  // else it has broken nothing
    }
  }
  const auto faster = [](const Entry& a, const Entry& b) { return a.milliseconds < b.milliseconds; };
  std::sort(entries.begin(), entries.end(), faster);
  if (entries.empty()) throw Failure("cuDNN has no plan that runs");
  constexpr size_t kFinal = 6;
  const auto end = entries.begin() + static_cast<int64_t>(std::min(entries.size(), kFinal));
  for (auto entry = entries.begin(); entry != end; ++entry) {
    args.workspace = workspace.get(entry->plan.workspace());
    if (args.workspace == nullptr) throw Failure("there is too little memory for a workspace");
    entry->milliseconds = stopwatch.time(20, 5, [&] { run_once(*entry, args, epilogue); });
  }
  const Entry& best = *std::min_element(entries.begin(), end, faster);
  report(-1, best.name.c_str(), best.milliseconds, best.plan.workspace());
  const std::string text = write_plan(best.plan);
  return best.is_apart ? kApart + text_of(without_rest(p)) + "\n" + text : text;
}

}  // namespace ai3::cudnn

// Writes the fastest plan's text for ai3_cudnn_set_plan(); the tensors of `args` are the GPU's, its workspace and
// stream are not used. `report` is told of each plan before it is tried, with -1 milliseconds, and after it; at the end
// of the fastest, with the index -1. `skip` holds names of plans to leave out, each between newlines. Answers the bytes
// that the text needs with its closing zero, or 0 where there is no plan (ai3_cudnn_message() says why).
extern "C" AI3_EXPORT int64_t ai3_cudnn_search(const ai3_args* args, const ai3_kernel* epilogue, int32_t most,
                                               const char* skip, ai3::cudnn::Report report, char* plan, int64_t size) {
  try {
    const std::string text = ai3::cudnn::search(args, epilogue, most, skip == nullptr ? "" : skip, report);
    if (static_cast<int64_t>(text.size()) < size) std::copy_n(text.c_str(), text.size() + 1, plan);
    return static_cast<int64_t>(text.size()) + 1;
  } catch (const std::exception& error) {
    ai3::cudnn::set_message(error.what());
    return 0;
  }
}
