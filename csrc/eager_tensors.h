// Tensors of functions that Python calls without PyTorch's dispatcher, which costs more than a small kernel. They cross
// by DLPack's C exchange interface, whose ABI is stable.
#pragma once

#include "python_api.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#include "dlpack_exchange.h"

namespace fastkd {

// That of torch, or nullptr before `enable_eager_tensors` and where it cannot be used.
inline const DLPackExchangeAPI* tensor_exchange = nullptr;

constexpr int64_t kTensorAlignment = 64;

// What precedes the data of an output, in the same allocation.
struct alignas(kTensorAlignment) TensorHeader {
  DLManagedTensorVersioned tensor;
  int64_t size, stride;
};

inline void release_tensor(DLManagedTensorVersioned* tensor) {
  std::free(tensor->manager_ctx);
}

// A new tensor [size]; `data` receives its memory. Empty where Python has an error set.
template <typename T>
Owned allocate_tensor(int64_t size, uint8_t type_code, T*& data) {
  const int64_t bytes = (size * static_cast<int64_t>(sizeof(T)) / kTensorAlignment + 1) * kTensorAlignment;
  void* memory = std::aligned_alloc(kTensorAlignment, sizeof(TensorHeader) + bytes);
  if (memory == nullptr) throw std::bad_alloc();
  data = reinterpret_cast<T*>(static_cast<char*>(memory) + sizeof(TensorHeader));
  auto* header = new (memory) TensorHeader{{}, size, 1};
  header->tensor.version = {1, 0};
  header->tensor.manager_ctx = memory;
  header->tensor.deleter = release_tensor;
  header->tensor.dl_tensor = {data, {kDLCPU, 0}, 1, {type_code, 8 * sizeof(T), 1}, &header->size, &header->stride, 0};
  void* object = nullptr;
  if (tensor_exchange->managed_tensor_to_py_object_no_sync(&header->tensor, &object) != 0) return nullptr;
  return Owned(static_cast<PyObject*>(object));
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
