// DLPack 1.3: the part of its C ABI with which tensors cross between libraries inside one Python process. Declared here
// because torch's copy of the header refuses to be included in a build for the stable ABI.
// https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

#include "python_api.h"

extern "C" {

struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
};

enum DLDeviceType : int32_t { kDLCPU = 1 };

struct DLDevice {
  DLDeviceType device_type;
  int32_t device_id;
};

enum DLDataTypeCode : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned* self);
  uint64_t flags;
  DLTensor dl_tensor;
};

struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  DLPackExchangeAPIHeader* prev_api;
};

struct DLPackExchangeAPI {
  DLPackExchangeAPIHeader header;
  int (*managed_tensor_allocator)(
      DLTensor* prototype,
      DLManagedTensorVersioned** out,
      void* error_ctx,
      void (*set_error)(void* error_ctx, const char* kind, const char* message));
  int (*managed_tensor_from_py_object_no_sync)(void* py_object, DLManagedTensorVersioned** out);
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned* tensor, void** out_py_object);
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  int (*current_work_stream)(DLDeviceType device_type, int32_t device_id, void** out_current_stream);
};

}  // extern "C"

// The interface in the capsule torch.Tensor.__dlpack_c_exchange_api__; nullptr where it is not the one declared here, and
// where the capsule holds something else, which is an error of Python.
inline const DLPackExchangeAPI* exchange_of(PyObject* capsule) {
  const auto* exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (exchange == nullptr) return nullptr;
  const bool usable = exchange->header.version.major == 1 && exchange->dltensor_from_py_object_no_sync != nullptr;
  return usable ? exchange : nullptr;
}
