// Tensors of functions that Python calls without PyTorch's dispatcher, which costs more than a small kernel. They cross
// by DLPack's C exchange interface, whose ABI is stable.
#pragma once

#include "python_api.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>

#include "dlpack_exchange.h"

namespace fastkd {

// That of torch, or nullptr before `enable_eager_tensors` and where it cannot be used.
inline const DLPackExchangeAPI* tensor_exchange = nullptr;

constexpr int64_t kTensorAlignment = 64;

// What precedes the data of an output, in the same allocation.
struct alignas(kTensorAlignment) TensorHeader {
  DLManagedTensorVersioned tensor;
  int64_t sizes[2], strides[2];
};

inline void release_tensor(DLManagedTensorVersioned* tensor) {
  std::free(tensor->manager_ctx);
}

// A new tensor of one or two dimensions; `data` receives its memory. Empty where Python has an error set.
inline Owned allocate_tensor(std::initializer_list<int64_t> sizes, DLDataType type, void*& data) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  const int64_t bytes = (count * (type.bits / 8) / kTensorAlignment + 1) * kTensorAlignment;
  void* memory = std::aligned_alloc(kTensorAlignment, sizeof(TensorHeader) + bytes);
  if (memory == nullptr) throw std::bad_alloc();
  data = static_cast<char*>(memory) + sizeof(TensorHeader);
  auto* header = new (memory) TensorHeader{};
  auto dim = static_cast<int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), header->sizes);
  for (int64_t d = dim - 1, stride = 1; d >= 0; stride *= header->sizes[d--]) header->strides[d] = stride;
  header->tensor.version = {1, 0};
  header->tensor.manager_ctx = memory;
  header->tensor.deleter = release_tensor;
  header->tensor.dl_tensor = {data, {kDLCPU, 0}, dim, type, header->sizes, header->strides, 0};
  void* object = nullptr;
  if (tensor_exchange->managed_tensor_to_py_object_no_sync(&header->tensor, &object) != 0) return nullptr;
  return Owned(static_cast<PyObject*>(object));
}

// A new tensor [size] of numbers as C++ has them.
template <typename T>
Owned allocate_tensor(int64_t size, uint8_t type_code, T*& data) {
  void* memory = nullptr;
  Owned tensor = allocate_tensor({size}, {type_code, 8 * sizeof(T), 1}, memory);
  data = static_cast<T*>(memory);
  return tensor;
}

// Whether `view` is now that of a tensor in the memory of the CPU.
inline bool view_tensor(PyObject* tensor, DLTensor& view) {
  if (tensor_exchange->dltensor_from_py_object_no_sync(tensor, &view) != 0) {
    PyErr_Clear();
    return false;
  }
  return view.device.device_type == kDLCPU && view.dtype.lanes == 1;
}

}  // namespace fastkd
