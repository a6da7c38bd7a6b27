// A run of ai3's operations as one call: what Python and PyTorch's dispatcher spend between two of them is as long as
// many a layer. The program is text, written by ai3_compile/passes/sequence.py, its operations parted by semicolons:
// Inductor copies it into comments of one line.
//
//   conv2d 7 t0 t3 o4 i1 i1 ... b1 n        value 7 = ai3::conv2d(value 0, value 3, optional value 4, 1, 1, ..., None)
//   max_pool2d_into - t9 i64 t7 ...         an operation that returns nothing
//   mul 8 t7 t3                             torch's own, as are `view 9 t8 i-1 i960` and `channels_last 1 t0`
//   image 9 t0 i-1 i96 i55 i55              an empty channels_last image; -1: as many as value 0 has
//   part 12 t9 i0 i64                       some channels of an image as they lie: what is written there later is seen
//   return 9 12
//
// The first values are the call's tensors. A value is let go of behind the last operation that reads it.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <mutex>
#include <string_view>
#include <unordered_map>

#include "unboxed.h"

namespace ai3 {
namespace {

Tensor image(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return empty_image(like, {batch < 0 ? like.size(0) : batch, channels, height, width}, true);
}
Tensor part(const Tensor& image, int64_t begin, int64_t end) {
  AI3_CHECK(image.dim() == 4 && 0 <= begin && begin <= end && end <= image.size(1), "ai3::sequence: channels ", begin,
            " to ", end, " are no part of an image");
  const std::array<int64_t, 4> sizes = {image.size(0), end - begin, image.size(2), image.size(3)};
  return view_from(image, begin * image.stride(1), sizes, image.strides());
}

// As many sizes as it has arguments behind the tensor.
bool view_accepts(const std::vector<Argument>& arguments) {
  return !arguments.empty() && arguments[0].kind == Argument::kTensor &&
         std::all_of(arguments.begin() + 1, arguments.end(),
                     [](const Argument& a) { return a.kind == Argument::kNumber; });
}

void view(const Step& step, Values& values, int64_t batch) {
  if (step.result < 0) return;
  std::vector<int64_t> sizes;
  for (size_t i = 1; i < step.arguments.size(); ++i) sizes.push_back(take<int64_t>(step.arguments[i], values));
  if (batch >= 0 && !sizes.empty() && sizes[0] >= 0) sizes[0] = batch;
  values[static_cast<size_t>(step.result)] = torch::stable::view(take<Tensor>(step.arguments[0], values), sizes);
}

// Operations that are not ai3's.
constexpr Operation kOthers[] = {
    {"image", Unboxed<&image>::accepts, Unboxed<&image>::call, 1, 0, 1, false},
    {kPart, Unboxed<&part>::accepts, Unboxed<&part>::call, 1, 0, 0, false},
    {"channels_last", Unboxed<&channels_last>::accepts, Unboxed<&channels_last>::call, 1},
    {"mul", Unboxed<&mul>::accepts, Unboxed<&mul>::call, 1 | 1 << 1},
    {"view", view_accepts, view, 1, 0, 1, false},
};

const Operation* find(std::string_view name) {
  const auto found =
      std::find_if(std::begin(kOthers), std::end(kOthers), [&](const auto& o) { return o.name == name; });
  return found == std::end(kOthers) ? find_operation(name) : found;
}

// Takes `text` up to the separator, and the separator, from it.
std::string_view take(std::string_view& text, char separator) {
  const size_t end = std::min(text.find(separator), text.size());
  const std::string_view word = text.substr(0, end);
  text.remove_prefix(std::min(end + 1, text.size()));
  return word;
}

template <typename T>
T number(std::string_view word) {
  T value{};
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  AI3_CHECK(error == std::errc() && end == word.data() + word.size(), "ai3::sequence: ", std::string(word),
            " is not a number");
  return value;
}

Argument argument(std::string_view word) {
  using torch::stable::detail::from;
  const std::string_view rest = word.substr(1);
  switch (word[0]) {
    case 't':
      return {Argument::kTensor, number<uint64_t>(rest)};
    case 'o':
      return {Argument::kOptional, number<uint64_t>(rest)};
    case 'n':
      return {Argument::kNumber, from(std::nullopt)};
    case 'i':
      return {Argument::kNumber, from(number<int64_t>(rest))};
    case 'b':
      return {Argument::kNumber, from(number<int>(rest) != 0)};
    case 'd':  // its bits
      return {Argument::kNumber, number<uint64_t>(rest)};
    default:
      fail("ai3::sequence: ", std::string(word), " is not an argument");
  }
}

Program parse(std::string_view text, size_t inputs) {
  Program program{{}, {}, inputs, inputs, {}, std::make_shared<Splits>()};
  while (!text.empty()) {
    std::string_view line = take(text, ';');
    const std::string_view name = take(line, ' ');
    if (name == "return") {
      while (!line.empty()) program.results.push_back(number<size_t>(take(line, ' ')));
      break;
    }
    Step step{find(name), {}, -1, {}};
    AI3_CHECK(step.operation != nullptr, "ai3::sequence: ", std::string(name), " is not an operation");
    const std::string_view result = take(line, ' ');
    if (result != "-") step.result = number<int64_t>(result);
    while (!line.empty()) step.arguments.push_back(argument(take(line, ' ')));
    AI3_CHECK(step.operation->accepts(step.arguments), "ai3::sequence: these are no arguments for ", std::string(name));
    program.values = std::max(program.values, static_cast<size_t>(step.result + 1));
    program.steps.push_back(std::move(step));
  }
  std::vector<bool> computed(program.values), read(program.values), images(program.values);
  std::fill_n(computed.begin(), inputs, true);
  for (const Step& step : program.steps) {
    for (size_t i = 0; i < step.arguments.size(); ++i) {
      const Argument& a = step.arguments[i];
      if (a.kind == Argument::kNumber) continue;
      AI3_CHECK(a.value < program.values, "ai3::sequence: there is no value ", a.value);
      AI3_CHECK(computed[a.value], "ai3::sequence: value ", a.value, " is read before it is computed");
      if (step.operation->is_image(i)) images[a.value] = true;
    }
    if (step.result >= 0) computed[static_cast<size_t>(step.result)] = true;
  }
  for (size_t value = 0; value < inputs; ++value) {
    if (images[value]) program.images.push_back(value);
  }
  for (const size_t value : program.results) {
    AI3_CHECK(value < program.values && computed[value], "ai3::sequence: there is no value ", value);
    read[value] = true;
  }
  for (auto step = program.steps.rbegin(); step != program.steps.rend(); ++step) {
    for (const Argument& a : step->arguments) {
      if (a.kind == Argument::kNumber) continue;
      if (!read[a.value]) step->unused.push_back(a.value);
      read[a.value] = true;
    }
  }
  return program;
}

std::shared_ptr<const Program> find_program(std::string_view text, size_t inputs) {
  static std::mutex mutex;
  static auto* known = new std::unordered_map<std::string, std::shared_ptr<const Program>>();
  const std::lock_guard lock(mutex);
  auto& program = (*known)[std::string(text)];
  if (program == nullptr) program = std::make_shared<const Program>(parse(text, inputs));
  AI3_CHECK(program->inputs == inputs, "ai3::sequence: a program of ", program->inputs, " tensors got ", inputs);
  return program;
}

std::vector<Tensor> run_program(const Program& program, Values values) {
  values.resize(program.values);
  run_steps(program, values);
  std::vector<Tensor> results;
  for (const size_t value : program.results) results.push_back(*values[value]);
  return results;
}

// sequence(str program, Tensor[] tensors) -> Tensor[], on the dispatcher's stack: the conversion that TORCH_BOX would
// make leaks the text.
void sequence(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  Values values;
  for (Tensor& tensor : to<std::vector<Tensor>>(stack[1])) values.emplace_back(std::move(tensor));
  const auto handle = to<StringHandle>(stack[0]);
  const std::unique_ptr<std::remove_pointer_t<StringHandle>, void (*)(StringHandle)> owner(
      handle, [](StringHandle h) { torch_delete_string(h); });
  const char* text = nullptr;
  size_t length = 0;
  AI3_CALL(torch_string_c_str(handle, &text));
  AI3_CALL(torch_string_length(handle, &length));
  const auto program = find_program({text, length}, values.size());
  stack[0] = torch::stable::detail::from(run_program(*program, std::move(values)));
}

}  // namespace

}  // namespace ai3

STABLE_TORCH_LIBRARY_FRAGMENT(ai3, m) { m.def("sequence(str program, Tensor[] tensors) -> Tensor[]"); }
STABLE_TORCH_LIBRARY_IMPL(ai3, CPU, m) { m.impl("sequence", &ai3::sequence); }
STABLE_TORCH_LIBRARY_IMPL(ai3, CUDA, m) { m.impl("sequence", &ai3::sequence); }
