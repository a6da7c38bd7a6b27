// A program of ai3::sequence: sequence.cpp reads it, split.cpp finds what to run for parts of a batch, parts.cpp runs
// that.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "core.h"

namespace ai3 {

struct Argument {
  enum { kNumber, kTensor, kOptional } kind;
  uint64_t value;  // a number as it lies on the dispatcher's stack, or which value the tensor is
};

struct Step {
  const Operation* operation;
  std::vector<Argument> arguments;
  int64_t result;              // -1: none
  std::vector<size_t> unused;  // values that no later step reads
};

// Steps that run one after another for some images of the batch at a time.
struct Split {
  // A value of these steps that is read behind them, and its layout; a part of an image is made anew from that.
  struct Kept {
    size_t value;
    const Step* part;  // null for a value of its own
    int32_t dtype;
    std::vector<int64_t> sizes, strides;
  };
  size_t begin, end;
  int64_t batch, parts;
  bool by_thread;                    // each thread computes parts of its own, else all threads one part after another
  std::vector<size_t> outer, whole;  // what is from before: images, and what every part needs whole
  std::vector<Kept> kept;

  bool keeps(size_t value) const {
    return std::any_of(kept.begin(), kept.end(), [&](const Kept& k) { return k.value == value; });
  }
};

// The splits of a program by the sizes and layouts of its inputs.
struct Splits {
  std::mutex mutex;
  std::map<std::vector<int64_t>, std::shared_ptr<const std::vector<Split>>> known;
};

struct Program {
  std::vector<Step> steps;
  std::vector<size_t> results;
  size_t inputs, values;
  std::vector<size_t> images;  // inputs that are
  std::shared_ptr<Splits> splits;
};

constexpr std::string_view kPart = "part";  // the operation whose result is a view of its argument

// With `batch` in the place of the size of the batch, unless that is negative.
inline void run_step(const Step& step, Values& values, int64_t batch = -1) {
  step.operation->call(step, values, batch);
}

// Operations of PyTorch's that stand between ai3's.
Tensor mul(const Tensor& a, const Tensor& b);
Tensor channels_last(const Tensor& image);

void run_split(const Program& program, const Split& split, Values& values);

void run_steps(const Program& program, Values& values);

}  // namespace ai3
