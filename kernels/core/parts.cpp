// Runs neighbouring steps of a program for some images of the batch at a time.
#include <cstring>
#include <exception>
#include <mutex>

#include "sequence.h"

namespace ai3 {
namespace {

// Some images of a batch as they lie.
Tensor images_of(const Tensor& t, int64_t begin, int64_t end) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes[0] = end - begin;
  return view_from(t, begin * t.stride(0), sizes, t.strides());
}

Tensor empty_like_kept(const Split::Kept& kept) {
  AtenTensorHandle made = nullptr;
  AI3_CALL(aoti_torch_empty_strided(static_cast<int64_t>(kept.sizes.size()), kept.sizes.data(), kept.strides.data(),
                                    kept.dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Copies what a part has left behind into the whole: by bytes, as a worker has not the caller's inference mode, in
// which alone PyTorch may write into the caller's tensors.
void copy_part(const Split::Kept& kept, const Tensor& part, const Tensor& whole, int64_t begin) {
  for (size_t d = 1; d < kept.sizes.size(); ++d) {
    AI3_CHECK(kept.sizes[d] == 1 || part.stride(static_cast<int64_t>(d)) == kept.strides[d],
              "ai3::sequence: a part of a batch has another layout than the whole");
  }
  const auto element = static_cast<int64_t>(part.element_size());
  std::memcpy(static_cast<char*>(whole.mutable_data_ptr()) + begin * kept.strides[0] * element, part.const_data_ptr(),
              static_cast<size_t>(part.numel() * element));
}

// Runs the steps for the images [begin, end).
Values run_part(const Program& program, const Split& split, const Values& values, int64_t begin, int64_t end) {
  Values own(values.size());
  for (const size_t value : split.whole) own[value] = values[value];
  for (const size_t value : split.outer) own[value] = images_of(*values[value], begin, end);
  for (size_t i = split.begin; i < split.end; ++i) {
    run_step(program.steps[i], own, end - begin);
    for (const size_t value : program.steps[i].unused) {
      // An image may be read later only as a part of it.
      if (!split.keeps(value)) own[value].reset();
    }
  }
  return own;
}

void run_in_turn(const Program& program, const Split& split, Values& values) {
  for (int64_t part = 0; part < split.parts; ++part) {
    const int64_t begin = split.batch * part / split.parts, end = split.batch * (part + 1) / split.parts;
    const Values own = run_part(program, split, values, begin, end);
    for (const auto& kept : split.kept) {
      if (kept.part != nullptr) continue;
      Tensor place = images_of(*values[kept.value], begin, end);
      torch::stable::copy_(place, *own[kept.value]);
    }
  }
}

void run_by_thread(const Program& program, const Split& split, const Values& values) {
  struct Task {
    const Program& program;
    const Split& split;
    const Values& values;
    std::mutex mutex;
    std::exception_ptr failure;

    void run(int64_t first, int64_t last) {
      const OneThread alone;
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = split.batch * part / split.parts, end = split.batch * (part + 1) / split.parts;
        if (begin == end) continue;
        const Values own = run_part(program, split, values, begin, end);
        for (const auto& kept : split.kept) {
          if (kept.part == nullptr) copy_part(kept, *own[kept.value], *values[kept.value], begin);
        }
      }
    }
  } task{program, split, values, {}, {}};
  AI3_CALL(torch_parallel_for(
      0, split.parts, 1,
      [](int64_t first, int64_t last, void* arg) {
        Task& t = *static_cast<Task*>(arg);
        try {
          t.run(first, last);
        } catch (...) {  // of an operation: raised again where the caller is
          const std::lock_guard lock(t.mutex);
          t.failure = std::current_exception();
        }
      },
      &task));
  if (task.failure) std::rethrow_exception(task.failure);
}

}  // namespace

void run_split(const Program& program, const Split& split, Values& values) {
  for (const auto& kept : split.kept) {
    if (kept.part == nullptr) values[kept.value] = empty_like_kept(kept);
  }
  (split.by_thread ? run_by_thread(program, split, values) : run_in_turn(program, split, values));
  for (const auto& kept : split.kept) {
    if (kept.part != nullptr) run_step(*kept.part, values);
  }
  for (size_t i = split.begin; i < split.end; ++i) {
    for (const size_t value : program.steps[i].unused) values[value].reset();
  }
}

}  // namespace ai3
