// The CPU exit gate called straight from Python: PyTorch's dispatcher and three allocations through it would cost more
// than deciding on a small batch. Tensors cross by DLPack's C exchange interface, whose ABI is stable.
#include "python_api.h"

#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>

#include "dlpack_exchange.h"
#include "exit_gate_cpu.h"

namespace {

using fastkd::Owned;

const DLPackExchangeAPI* exchange = nullptr;

// releasing the lock of the interpreter costs about as much as this many elements
constexpr int64_t kElementsWorthUnlocking = 4096;

constexpr int64_t kAlignment = 64;

// What precedes the data of an output, in the same allocation.
struct alignas(kAlignment) Header {
  DLManagedTensorVersioned tensor;
  int64_t size, stride;
};

void release(DLManagedTensorVersioned* tensor) {
  std::free(tensor->manager_ctx);
}

// A new tensor [size] of 4-byte elements; `data` receives its memory. Empty where Python has an error set.
template <typename T>
Owned allocate(int64_t size, uint8_t type_code, T*& data) {
  const int64_t bytes = (size * static_cast<int64_t>(sizeof(T)) / kAlignment + 1) * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, sizeof(Header) + bytes);
  if (memory == nullptr) throw std::bad_alloc();
  data = reinterpret_cast<T*>(static_cast<char*>(memory) + sizeof(Header));
  Header* header = new (memory) Header{{}, size, 1};
  header->tensor.version = {1, 0};
  header->tensor.manager_ctx = memory;
  header->tensor.deleter = release;
  header->tensor.dl_tensor = {data, {kDLCPU, 0}, 1, {type_code, 32, 1}, &header->size, &header->stride, 0};
  void* object = nullptr;
  if (exchange->managed_tensor_to_py_object_no_sync(&header->tensor, &object) != 0) return nullptr;
  return Owned(static_cast<PyObject*>(object));
}

bool logits_type(DLDataType type, fastkd::LogitsType& result) {
  if (type.lanes != 1) return false;
  if (type.code == kDLFloat && type.bits == 32) {
    result = fastkd::LogitsType::kFloat32;
  } else if (type.code == kDLBfloat && type.bits == 16) {
    result = fastkd::LogitsType::kBFloat16;
  } else if (type.code == kDLFloat && type.bits == 16) {
    result = fastkd::LogitsType::kFloat16;
  } else {
    return false;
  }
  return true;
}

// The gate without its criterion; false where the logits need the care of the dispatcher and of its errors.
bool read_logits(PyObject* logits, fastkd::ExitGate& gate) {
  DLTensor view;
  if (exchange->dltensor_from_py_object_no_sync(logits, &view) != 0) {
    PyErr_Clear();
    return false;
  }
  if (view.device.device_type != kDLCPU || view.ndim != 2 || view.shape[1] < 2 || view.shape[0] > INT32_MAX ||
      !logits_type(view.dtype, gate.type)) {
    return false;
  }
  gate.logits = static_cast<const char*>(view.data) + view.byte_offset;
  gate.rows = view.shape[0];
  gate.columns = view.shape[1];
  gate.row_stride = view.strides ? view.strides[0] : view.shape[1];
  gate.column_stride = view.strides ? view.strides[1] : 1;
  return true;
}

PyObject* decide(const fastkd::ExitGate& gate) {
  float* uncertainty;
  int32_t *survivors, *count;
  const Owned decision[] = {
      allocate(gate.rows, kDLFloat, uncertainty), allocate(gate.rows, kDLInt, survivors), allocate(1, kDLInt, count)};
  for (const Owned& tensor : decision) {
    if (!tensor) return nullptr;
  }
  {
    std::optional<fastkd::Unlocked> unlocked;
    if (gate.rows * gate.columns > kElementsWorthUnlocking) unlocked.emplace();
    fastkd::exit_gate(gate, uncertainty, survivors, count);
  }
  return PyTuple_Pack(3, decision[0].get(), decision[1].get(), decision[2].get());
}

// exit_gate(logits, speed, criterion, top_n) -> (uncertainty, survivors, count), or None where the arguments need the care
// of the dispatcher and of its errors.
PyObject* exit_gate(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 4 || exchange == nullptr) {
    PyErr_SetString(PyExc_TypeError, "exit_gate: logits, speed, criterion, top_n, after enable_eager_exit_gate");
    return nullptr;
  }
  const double speed = PyFloat_AsDouble(given[1]);
  const int64_t criterion = PyLong_AsLongLong(given[2]), top_n = PyLong_AsLongLong(given[3]);
  if (PyErr_Occurred()) return nullptr;
  fastkd::ExitGate gate{};
  if (!read_logits(given[0], gate)) Py_RETURN_NONE;
  const bool known = fastkd::is_valid(criterion, top_n, gate.columns) && criterion != fastkd::kPatience;
  if (!known || !(speed >= 0 && speed <= 1)) Py_RETURN_NONE;
  gate.criterion = static_cast<fastkd::Criterion>(criterion);
  gate.top_n = top_n;
  gate.speed = static_cast<float>(speed);
  return fastkd::catching([&] { return decide(gate); });
}

PyObject* enable_eager_exit_gate(PyObject*, PyObject* capsule) {
  exchange = exchange_of(capsule);
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(exchange != nullptr);
}

PyMethodDef methods[] = {
    fastkd::method(
        "enable_eager_exit_gate", enable_eager_exit_gate, METH_O,
        "Give exit_gate the capsule torch.Tensor.__dlpack_c_exchange_api__; False where it cannot be used."),
    fastkd::method("exit_gate", exit_gate, METH_FASTCALL, "Eager CPU exit gate, after enable_eager_exit_gate."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool bind_exit_gate(PyObject* module) {
  const Owned criteria(PyTuple_New(fastkd::kCriteria));
  if (!criteria) return false;
  for (Py_ssize_t index = 0; index < fastkd::kCriteria; ++index) {
    PyObject* name = PyUnicode_FromString(fastkd::kCriterionNames[index]);
    if (name == nullptr || PyTuple_SetItem(criteria.get(), index, name) != 0) return false;
  }
  return PyObject_SetAttrString(module, "criteria", criteria.get()) == 0 && PyModule_AddFunctions(module, methods) == 0;
}
