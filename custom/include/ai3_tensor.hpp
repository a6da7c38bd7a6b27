// Part of ai3.hpp: the tensor.
#pragma once

/// Bytes of one element.
inline uint size_of_scalar_type(ScalarType type) {
  return type == ScalarType::Float32 ? uint(sizeof(float)) : uint(sizeof(double));
}

/// A contiguous tensor: the last dimension varies fastest. It is moved, never copied.
class Tensor {
 public:
  Tensor() = default;

  /// Allocates a tensor of this shape; its contents are undefined.
  Tensor(const std::vector<uint>& s, ScalarType scalar_type)
      : data(allocate(scalar_type, count_of(s))), shape(s), owned(true), scalar_type(scalar_type) {}

  /// A tensor over `data`, which it deletes in the end where `own` is true: then `data` is from new float[] or
  /// new double[].
  Tensor(void* data, const std::vector<uint>& s, bool own, ScalarType scalar_type)
      : data(data), shape(s), owned(own), scalar_type(scalar_type) {}

  /// A copy of what is at this address.
  Tensor(const intptr_t data_address, const std::vector<uint>& s, ScalarType scalar_type) : Tensor(s, scalar_type) {
    if (count() != 0)
      std::memcpy(data, reinterpret_cast<const void*>(data_address),
                  size_t(count()) * size_of_scalar_type(scalar_type));
  }

  /// A tensor over what is at this address, which stays the caller's.
  static Tensor form_tensor(const intptr_t data_address, const std::vector<uint>& s, ScalarType scalar_type) {
    return Tensor(reinterpret_cast<void*>(data_address), s, false, scalar_type);
  }

  /// Where there is an address: a copy of what is there (`own`), or a tensor over it.
  static std::optional<Tensor> from_optional(const std::optional<intptr_t>& data_address, const std::vector<uint>& s,
                                             ScalarType scalar_type, bool own = true) {
    if (!data_address.has_value()) return std::nullopt;
    return own ? Tensor(*data_address, s, scalar_type) : form_tensor(*data_address, s, scalar_type);
  }

  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  Tensor(Tensor&& other) noexcept
      : data(std::exchange(other.data, nullptr)),
        shape(std::move(other.shape)),
        owned(std::exchange(other.owned, false)),
        scalar_type(other.scalar_type) {}
  Tensor& operator=(Tensor&& other) noexcept {
    if (this != &other) {
      release();
      data = std::exchange(other.data, nullptr);
      shape = std::move(other.shape);
      owned = std::exchange(other.owned, false);
      scalar_type = other.scalar_type;
    }
    return *this;
  }
  ~Tensor() { release(); }

  /// A new tensor with the elements converted: to_type<double>(ScalarType::Float64).
  template <typename target_type>
  Tensor to_type(ScalarType to_type) const {
    Tensor converted(shape, to_type);
    errs::bail_if(sizeof(target_type) != size_of_scalar_type(to_type), "to_type: the type is not that of ", to_type);
    target_type* to = data_as<target_type>(converted.data);
    if (scalar_type == ScalarType::Float32) {
      std::copy_n(data_as<float>(data), count(), to);
    } else {
      std::copy_n(data_as<double>(data), count(), to);
    }
    return converted;
  }

  /// Whether there is a dimension for the batch; `data_dim` is from sample_dims.
  bool batched(const int data_dim) const { return shape.size() == size_t(data_dim) + 1; }

  /// Number of samples of a batched tensor; `input_dims` is from sample_dims.
  uint batch_size(const uint input_dims) const { return shape[shape.size() - 1 - input_dims]; }

  /// Of a convolution's weight [output channels, input channels, height, width].
  uint output_channels() const { return shape[shape.size() - 4]; }

  /// Of an image [(samples,) channels, height, width] or a weight; divided by the groups in a weight.
  uint input_channels() const { return shape[shape.size() - 3]; }

  /// The last dimension but one: of a linear's weight, the output features.
  uint height() const { return shape[shape.size() - 2]; }

  /// The last dimension: of a linear's input and weight, the input features.
  uint width() const { return shape[shape.size() - 1]; }

  /// Number of elements; 0 for a tensor without dimensions.
  uint count() const { return count_of(shape); }

  void* data = nullptr;
  std::vector<uint> shape;
  bool owned = false;
  ScalarType scalar_type = ScalarType::Float32;

 private:
  static uint count_of(const std::vector<uint>& s) {
    return s.empty() ? 0 : std::accumulate(s.begin(), s.end(), 1u, std::multiplies<uint>());
  }

  static void* allocate(ScalarType type, uint count) {
    if (type == ScalarType::Float32) return new float[count];
    return new double[count];
  }

  void release() {
    if (!owned) return;
    if (scalar_type == ScalarType::Float32) {
      delete[] data_as<float>(data);
    } else {
      delete[] data_as<double>(data);
    }
  }
};

inline void ensure_same_type(const Tensor& a, const Tensor& b) {
  errs::bail_if(a.scalar_type != b.scalar_type, "tensors have different data types: ", a.scalar_type, " and ",
                b.scalar_type);
}

inline void ensure_same_type(const Tensor& a, const Tensor& b, const std::optional<const Tensor>& c) {
  ensure_same_type(a, b);
  if (c.has_value()) ensure_same_type(a, *c);
}
