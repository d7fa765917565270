// What the CPU and the CUDA kernel of `compact` share: the checks of one call, and how a row of a tensor is laid out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "memory.h"

namespace fastkd::compact {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements of one row: the product of all dimensions but the first.
inline int64_t row_numel(const Tensor& tensor) {
  int64_t numel = 1;
  for (int64_t d = 1; d < tensor.dim(); ++d) numel *= tensor.size(d);
  return numel;
}

// Whether every dimension but the first is laid out densely.
inline bool has_dense_rows(const Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

// How many rows the outputs have room for.
inline int64_t capacity_of(const Tensor& survivors) {
  STD_TORCH_CHECK(survivors.dim() == 1, "survivors: expected a vector");
  return survivors.size(0);
}

// The Python wrapper turns bad input into typed errors; these guard memory when the op is called directly.
inline void check(
    const std::vector<Tensor>& tensors,
    const Tensor& survivors,
    const std::optional<Tensor>& count,
    const std::vector<Tensor>& out) {
  STD_TORCH_CHECK(!tensors.empty(), "tensors: got none, expected at least one");
  STD_TORCH_CHECK(out.size() == tensors.size(), "out: got ", out.size(), " tensors for ", tensors.size());
  const auto index_type = survivors.scalar_type();
  STD_TORCH_CHECK(
      index_type == ScalarType::Int || index_type == ScalarType::Long, "survivors: expected int32 or int64");
  const int64_t capacity = capacity_of(survivors);
  const auto device = survivors.device();
  STD_TORCH_CHECK(
      !count || (count->numel() == 1 && count->scalar_type() == ScalarType::Int && count->device() == device),
      "count: expected one int32 on the device of survivors");
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Tensor& source = tensors[t];
    const Tensor& target = out[t];
    STD_TORCH_CHECK(
        source.dim() > 0 && source.size(0) == tensors[0].size(0),
        "tensors: expected the same first dimension in all of them");
    STD_TORCH_CHECK(
        source.device() == device && target.device() == device, "tensors, out: expected all of them on one device");
    STD_TORCH_CHECK(
        target.scalar_type() == source.scalar_type() && target.dim() == source.dim() && target.is_contiguous() &&
            target.size(0) >= capacity,
        "out: expected a contiguous tensor of the same dtype with room for every survivor");
    for (int64_t d = 1; d < source.dim(); ++d) {
      STD_TORCH_CHECK(target.size(d) == source.size(d), "out: expected the trailing shapes of tensors");
    }
  }
  check_no_overlap(tensors, out);
  for (const Tensor& target : out) {
    STD_TORCH_CHECK(!overlap(target, survivors) && !(count && overlap(target, *count)), "out: it overlaps an input");
  }
}

// New contiguous memory for `rows` rows like those of each tensor.
inline std::vector<Tensor> allocate(const std::vector<Tensor>& tensors, int64_t rows) {
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  std::vector<int64_t> sizes, strides;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.dim() > 0, "tensors: expected at least one dimension");
    const int64_t dim = tensor.dim();
    sizes.assign(dim, rows);
    strides.assign(dim, 1);
    for (int64_t d = dim - 1; d > 0; --d) {
      sizes[d] = tensor.size(d);
      strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
    }
    int32_t dtype, device_type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    AtenTensorHandle made;
    // a third of the time of torch::stable::empty, which goes through the dispatcher
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        dim, sizes.data(), strides.data(), dtype, device_type, tensor.get_device_index(), &made));
    out.emplace_back(made);
  }
  return out;
}

}  // namespace fastkd::compact
