// Runs the steps of a program. A batch goes through neighbouring steps a few images at a time where that keeps them in
// cache, as otherwise each image would go to memory and back between two steps. Weights are read once for every part
// instead. Where weights are small, every thread takes images of its own, which stay in its own cache; where the images
// of a step are larger than the last-level cache, all threads share as many images as fit it.
#include <algorithm>
#include <optional>
#include <set>

#include "sequence.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace ai3 {
namespace {

// Of the last-level cache, for the images of an operation: weights, other programs and, on a server, other machines of
// the same host have their share in it. Of seven networks on an EPYC a half served six as well as a quarter or all of
// it, or better.
int64_t cache_bytes() {
  static const int64_t bytes = [] {
    constexpr int64_t kMost = int64_t{16} << 20, kUnknown = int64_t{4} << 20;
#ifdef _SC_LEVEL3_CACHE_SIZE
    if (const long found = sysconf(_SC_LEVEL3_CACHE_SIZE); found > 0) return std::min<int64_t>(found / 2, kMost);
#endif
    return kUnknown;
  }();
  return bytes;
}

// What a step was seen to work on.
struct Seen {
  int64_t batch = 0;                    // 0: its batch cannot be split
  int64_t bytes = 0;                    // of its images
  int64_t weights = 0;                  // bytes of its other tensors, as far as algorithms read them packed
  std::vector<int64_t> sizes, strides;  // of its result
  int32_t dtype = 0;
};

template <typename Visit>
void visit_values(const Step& step, Visit visit) {
  for (size_t i = 0; i < step.arguments.size(); ++i) {
    if (step.arguments[i].kind != Argument::kNumber) visit(step.arguments[i].value, step.operation->is_image(i));
  }
}

int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

// Of a weight: Winograd's transformed ones of F(4x4, 3x3) are four times as large.
int64_t packed_bytes(const Tensor& t) {
  const bool is_window = t.dim() == 4 && t.size(2) * t.size(3) > 1 && t.size(1) > 1;
  return (is_window ? 4 : 1) * bytes_of(t);
}

// Weights that are not kept would be packed for every part.
bool keeps_weights(const Step& step) {
  const uint64_t argument = step.operation->static_weight;
  if (argument == 0 || argument >= step.arguments.size()) return true;
  return torch::stable::detail::to<bool>(step.arguments[argument].value);
}

// Looks at a step's images: before it is run, and at the result behind it.
Seen look_at_images(const Step& step, const Values& values) {
  Seen seen;
  bool splits = step.operation->images != 0 && keeps_weights(step);
  visit_values(step, [&](size_t value, bool image) {
    const Tensor& t = *values[value];
    if (!image) {
      seen.weights += packed_bytes(t);
      return;
    }
    splits = splits && t.dim() == 4 && (seen.batch == 0 || t.size(0) == seen.batch);
    seen.batch = t.dim() > 0 ? t.size(0) : 0;
    if (step.operation->computes) seen.bytes += bytes_of(t);
  });
  if (!splits) seen.batch = 0;
  return seen;
}

void look_at_result(const Step& step, const Tensor& result, Seen& seen) {
  AI3_CALL(aoti_torch_get_dtype(result.get(), &seen.dtype));
  seen.sizes.assign(result.sizes().begin(), result.sizes().end());
  seen.strides.assign(result.strides().begin(), result.strides().end());
  if (step.operation->computes) seen.bytes += bytes_of(result);
  if (result.dim() == 0 || result.size(0) != seen.batch) seen.batch = 0;
}

// What the steps [begin, end) need from before and leave behind. False where a weight is among what they compute, or an
// image among the weights.
bool find_borders(const Program& program, const std::vector<Seen>& seen, Split& split) {
  std::set<size_t> made, outer, whole;
  bool fits = true;
  for (size_t i = split.begin; i < split.end; ++i) {
    const Step& step = program.steps[i];
    visit_values(step, [&](size_t value, bool image) {
      if (made.count(value) == 0) (image ? outer : whole).insert(value);
      fits = fits && (image || made.count(value) == 0);
    });
    if (step.result >= 0) made.insert(static_cast<size_t>(step.result));
  }
  for (const size_t value : whole) fits = fits && outer.count(value) == 0;

  std::set<size_t> later(program.results.begin(), program.results.end());
  for (size_t i = split.end; i < program.steps.size(); ++i)
    visit_values(program.steps[i], [&](size_t value, bool) { later.insert(value); });
  for (size_t i = split.end; i-- > split.begin;) {  // backwards: an image is kept for a part of it
    const Step& step = program.steps[i];
    if (step.result < 0 || later.count(static_cast<size_t>(step.result)) == 0) continue;
    const bool part = step.operation->name == kPart;
    if (part) later.insert(step.arguments[0].value);
    split.kept.push_back(
        {static_cast<size_t>(step.result), part ? &step : nullptr, seen[i].dtype, seen[i].sizes, seen[i].strides});
  }
  std::reverse(split.kept.begin(), split.kept.end());  // an image comes before its parts
  split.outer.assign(outer.begin(), outer.end());
  split.whole.assign(whole.begin(), whole.end());
  return fits;
}

// Whether the elements are next to each other, so that some images of the batch are one block of memory.
bool is_dense(const Split::Kept& kept) {
  int64_t elements = 1, last = 0;
  for (size_t d = 0; d < kept.sizes.size(); ++d) {
    elements *= kept.sizes[d];
    last += (kept.sizes[d] - 1) * kept.strides[d];
    if (kept.sizes[d] > 1 && kept.strides[d] > kept.strides[0]) return false;
  }
  return elements > 0 && last == elements - 1;
}

// Whether a thread should compute this step for images of its own: it then reads the weights for each of them, and the
// images of all threads share the cache.
bool fits_a_thread(const Seen& seen, int64_t threads) {
  const int64_t image = seen.bytes / std::max<int64_t>(1, seen.batch);
  return seen.weights <= image && image * threads <= cache_bytes();
}

// Of the steps [i, next), whose batch can be split: from the first that the cache does not hold to the last.
void find_large(const Program& program, const std::vector<Seen>& seen, size_t i, size_t next,
                std::vector<Split>& splits) {
  const auto is_large = [&](size_t step) { return seen[step].bytes > cache_bytes(); };
  size_t begin = i, end = next;
  while (begin < end && !is_large(begin)) ++begin;
  while (begin < end && !is_large(end - 1)) --end;
  if (end - begin < 2) return;
  const int64_t batch = seen[begin].batch;
  int64_t most = 0;
  for (size_t step = begin; step < end; ++step) most = std::max(most, seen[step].bytes / batch);
  const int64_t images = std::clamp<int64_t>(cache_bytes() / std::max<int64_t>(1, most), 1, batch);
  Split split{begin, end, batch, (batch + images - 1) / images, false, {}, {}, {}};
  if (split.parts > 1 && find_borders(program, seen, split)) splits.push_back(std::move(split));
}

// The steps [begin, end) for images of each thread's own, where that goes.
std::optional<Split> find_by_thread(const Program& program, const std::vector<Seen>& seen, size_t begin, size_t end,
                                    int64_t threads) {
  constexpr size_t kFewest = 2;         // what goes in and out of fewer is all that there is
  constexpr int64_t kNear = 512 << 10;  // small images go together as far as they stay near the core
  const int64_t batch = seen[begin].batch;
  int64_t most = 0;
  size_t computing = 0;
  for (size_t step = begin; step < end; ++step) {
    most = std::max(most, seen[step].bytes / batch);
    computing += seen[step].bytes > 0;
  }
  if (computing < kFewest) return std::nullopt;
  const int64_t share = (batch + threads - 1) / threads;
  const int64_t images = std::clamp<int64_t>(kNear / std::max<int64_t>(1, most), 1, share);
  Split split{begin, end, batch, threads * ((share + images - 1) / images), true, {}, {}, {}};
  if (!find_borders(program, seen, split)) return std::nullopt;
  for (const auto& kept : split.kept) {
    if (kept.part == nullptr && !is_dense(kept)) return std::nullopt;
  }
  return split;
}

// Of neighbouring steps whose batch can be split.
std::vector<Split> find_splits(const Program& program, const std::vector<Seen>& seen) {
  std::vector<Split> splits;
  const int64_t threads = torch::stable::get_num_threads();
  for (size_t i = 0, next; i < seen.size(); i = next) {
    const int64_t batch = seen[i].batch;
    for (next = i + 1; next < seen.size() && seen[next].batch == batch; ++next) {
    }
    if (batch < 2) continue;
    // The last images must not leave most of the threads waiting.
    const bool shares = batch >= threads && (batch + threads - 1) / threads * threads * 10 <= batch * 11;
    size_t rest = i;  // where what is not by thread begins
    for (size_t begin = i, end; begin < next; begin = end) {
      end = begin + 1;
      if (!shares || !fits_a_thread(seen[begin], threads)) continue;
      while (end < next && fits_a_thread(seen[end], threads)) ++end;
      std::optional<Split> found = find_by_thread(program, seen, begin, end, threads);
      if (!found) continue;
      find_large(program, seen, rest, begin, splits);
      splits.push_back(std::move(*found));
      rest = end;
    }
    find_large(program, seen, rest, next, splits);
  }
  return splits;
}

// Every step for the whole batch.
std::vector<Seen> run_whole(const Program& program, Values& values) {
  std::vector<Seen> all;
  for (const Step& step : program.steps) {
    Seen seen = look_at_images(step, values);
    run_step(step, values);
    if (step.result >= 0) look_at_result(step, *values[static_cast<size_t>(step.result)], seen);
    all.push_back(std::move(seen));
    for (const size_t value : step.unused) values[value].reset();
  }
  return all;
}

// Whether there is a batch to split: asked first, as most calls are of one image.
bool has_batch(const Program& program, const Values& values) {
  return std::any_of(program.images.begin(), program.images.end(), [&](size_t image) {
    const Tensor& t = *values[image];
    return t.dim() == 4 && t.size(0) > 1;
  });
}

// What the sizes and layouts of all values follow from.
std::vector<int64_t> layout_of_inputs(const Program& program, const Values& values) {
  std::vector<int64_t> layout{torch::stable::get_num_threads()};
  const auto add = [&](auto numbers) { layout.insert(layout.end(), numbers.begin(), numbers.end()); };
  for (size_t i = 0; i < program.inputs; ++i) {
    layout.push_back(values[i]->dim());
    layout.push_back(static_cast<int64_t>(values[i]->element_size()));
    add(values[i]->sizes());
  }
  for (const size_t image : program.images) add(values[image]->strides());
  return layout;
}

}  // namespace

void run_steps(const Program& program, Values& values) {
  constexpr size_t kMaxKnown = 64;  // of a program whose sizes never repeat they are found anew
  static const auto none = std::make_shared<const std::vector<Split>>();
  std::shared_ptr<const std::vector<Split>> splits = none;
  if (has_batch(program, values) && values[0]->is_cpu()) {
    const std::vector<int64_t> layout = layout_of_inputs(program, values);
    Splits& all = *program.splits;
    std::unique_lock lock(all.mutex);
    const auto found = all.known.find(layout);
    if (found == all.known.end()) {
      lock.unlock();
      splits = std::make_shared<const std::vector<Split>>(find_splits(program, run_whole(program, values)));
      lock.lock();
      if (all.known.size() >= kMaxKnown) all.known.clear();
      all.known.emplace(layout, splits);
      return;
    }
    splits = found->second;
  }
  auto split = splits->begin();
  for (size_t i = 0; i < program.steps.size();) {
    if (split != splits->end() && split->begin == i) {
      run_split(program, *split, values);
      i = split++->end;
      continue;
    }
    run_step(program.steps[i], values);
    for (const size_t value : program.steps[i].unused) values[value].reset();
    ++i;
  }
}

}  // namespace ai3
