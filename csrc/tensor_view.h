// A tensor as kernels on the CPU read it, whoever holds it: PyTorch's dispatcher, or a function that Python calls without.
#pragma once

#include <cstdint>

#include "stable_compat.h"

namespace fastkd {

using torch::headeronly::ScalarType;

// As PyTorch calls it in Python, for messages.
inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// Its methods are called as those of torch::stable::Tensor are. Sizes and strides are the tensor's own.
class TensorView {
 public:
  TensorView(
      void* data, ScalarType type, int64_t element_size, bool is_cpu, int64_t dim, const int64_t* sizes,
      const int64_t* strides)
      : data_(data),
        sizes_(sizes),
        strides_(strides),
        dim_(dim),
        element_size_(element_size),
        type_(type),
        is_cpu_(is_cpu) {}

  // Of a tensor that is only read.
  template <typename Tensor>
  static TensorView of(const Tensor& tensor) {
    return of(tensor, const_cast<void*>(tensor.const_data_ptr()));
  }

  template <typename Tensor>
  static TensorView writable(const Tensor& tensor) {
    return of(tensor, tensor.mutable_data_ptr());
  }

  const void* const_data_ptr() const {
    return data_;
  }
  void* mutable_data_ptr() const {
    return data_;
  }
  ScalarType scalar_type() const {
    return type_;
  }
  bool is_cpu() const {
    return is_cpu_;
  }
  int64_t dim() const {
    return dim_;
  }
  int64_t size(int64_t d) const {
    return sizes_[d];
  }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < dim_; ++d) count *= sizes_[d];
    return count;
  }
  // null where the tensor came without strides, which says that it is contiguous
  int64_t stride(int64_t d) const {
    if (strides_) return strides_[d];
    int64_t stride = 1;
    for (int64_t inner = d + 1; inner < dim_; ++inner) stride *= sizes_[inner];
    return stride;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    if (!strides_ || numel() == 0) return true;
    for (int64_t d = dim_ - 1; d >= 0; --d) {
      if (sizes_[d] == 1) continue;
      if (strides_[d] != expected) return false;
      expected *= sizes_[d];
    }
    return true;
  }
  int64_t element_size() const {
    return element_size_;
  }

 private:
  template <typename Tensor>
  static TensorView of(const Tensor& tensor, void* data) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    return {
        data,           tensor.scalar_type(), static_cast<int64_t>(tensor.element_size()), tensor.is_cpu(), tensor.dim(),
        sizes.data(), strides.data()};
  }

  void* data_;
  const int64_t *sizes_, *strides_;
  int64_t dim_, element_size_;
  ScalarType type_;
  bool is_cpu_;
};

}  // namespace fastkd
