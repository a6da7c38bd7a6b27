// Calls of the core library's functions on the values of a program, without the dispatcher's stack, on which every
// tensor costs allocations.
#pragma once

#include <type_traits>
#include <utility>

#include "sequence.h"

namespace ai3 {

template <typename T>
bool fits(const Argument& argument) {
  using Kind = std::decay_t<T>;
  if constexpr (std::is_same_v<Kind, Tensor>) return argument.kind == Argument::kTensor;
  if constexpr (std::is_same_v<Kind, OptionalTensor>) return argument.kind != Argument::kTensor;
  return argument.kind == Argument::kNumber;
}

template <typename T>
decltype(auto) take(const Argument& argument, const Values& values) {
  using Kind = std::decay_t<T>;
  if constexpr (std::is_same_v<Kind, Tensor>) {
    return (*values[argument.value]);
  } else if constexpr (std::is_same_v<Kind, OptionalTensor>) {
    static const OptionalTensor none;
    return (argument.kind == Argument::kNumber ? none : values[argument.value]);
  } else {
    return torch::stable::detail::to<Kind>(argument.value);
  }
}

template <auto F>
struct Unboxed;

template <typename Result, typename... Parameters, Result (*F)(Parameters...)>
struct Unboxed<F> {
  static bool accepts(const std::vector<Argument>& arguments) {
    return arguments.size() == sizeof...(Parameters) && all_fit(arguments, std::index_sequence_for<Parameters...>());
  }

  // With `batch` in the place of the size of the batch, unless one of the two is negative.
  static void call(const Step& step, Values& values, int64_t batch) {
    call(step, values, batch, std::index_sequence_for<Parameters...>());
  }

 private:
  template <size_t... I>
  static bool all_fit(const std::vector<Argument>& arguments, std::index_sequence<I...>) {
    return (fits<Parameters>(arguments[I]) && ...);
  }

  template <typename T>
  static decltype(auto) argument(const Step& step, size_t i, const Values& values, int64_t batch) {
    if constexpr (std::is_same_v<T, int64_t>) {
      const int64_t value = take<T>(step.arguments[i], values);
      const bool is_batch = i > 0 && i == step.operation->batch && batch >= 0 && value >= 0;
      return int64_t{is_batch ? batch : value};
    } else {
      return take<T>(step.arguments[i], values);
    }
  }

  template <size_t... I>
  static void call(const Step& step, Values& values, int64_t batch, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<Result>) {
      F(argument<Parameters>(step, I, values, batch)...);
    } else {
      Tensor result = F(argument<Parameters>(step, I, values, batch)...);
      if (step.result >= 0) values[static_cast<size_t>(step.result)] = std::move(result);
    }
  }
};

}  // namespace ai3
