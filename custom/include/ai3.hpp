// What a header of the user's own (conv2d.hpp, relu.hpp, ...) is written against: the API of ai3's predecessor aithree,
// so that its headers compile unchanged. The names and signatures are fixed by that; kernels/include/ai3/kernel.h is
// the interface for algorithms that need more.
#pragma once

// Old headers use parts of the standard library that they got from here.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iostream>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

typedef unsigned int uint;

/// Work items in a group on a device that does not say better.
#ifndef GROUP_SIZE_GUESS
#define GROUP_SIZE_GUESS 1024
#endif

enum class PaddingMode { Zeros, Reflect, Replicate, Circular };

enum class ScalarType { Float32, Float64 };

inline std::ostream& operator<<(std::ostream& os, ScalarType type) {
  return os << (type == ScalarType::Float32 ? "Float" : "Double");
}

/// Tensor::data as elements.
template <typename dtype>
inline dtype* data_as(void* data) {
  return static_cast<dtype*>(data);
}

/// What is thrown here is the error that Python raises, once the function returns to ai3.
namespace errs {

/// An argument of bail as text. Only what has no other way goes through a stream: where PyTorch brings another
/// libstdc++ into the process, streams crash.
template <typename T>
std::string text_of(const T& value) {
  if constexpr (std::is_same_v<T, ScalarType>) {
    return value == ScalarType::Float32 ? "Float" : "Double";
  } else if constexpr (std::is_arithmetic_v<T>) {
    return std::to_string(value);
  } else if constexpr (std::is_convertible_v<T, std::string>) {
    return value;
  } else {
    std::ostringstream text;
    text << value;
    return text.str();
  }
}

/// Throws the arguments, written one behind the other.
template <typename... Args>
[[noreturn]] void bail(Args... args) {
  throw std::runtime_error((std::string() + ... + text_of(args)));
}

template <typename... Args>
void bail_if(bool check, Args... args) {
  if (check) bail(args...);
}

[[noreturn]] inline void invalid_dtype(ScalarType type) { bail("invalid dtype: ", type); }

/// `name` is the operation, as in "conv2d".
[[noreturn]] inline void no_user_def(const std::string& name) {
  bail(name, ".hpp holds no implementation yet: write ", name, "_custom");
}

inline void warning(const std::string& message) { std::cerr << "warning: " << message << std::endl; }

}  // namespace errs

/// Number of dimensions of one sample; a batched tensor has one more. -1: any number.
namespace sample_dims {
const int LINEAR = 1;
const int POOL2D = 3;
const int CONV2D = 3;
const int ACTIVATION = -1;
const int FLATTEN = -1;
}  // namespace sample_dims

#include "ai3_shapes.hpp"
#include "ai3_tensor.hpp"
