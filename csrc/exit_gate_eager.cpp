// The CPU exit gate called straight from Python: PyTorch's dispatcher and three allocations through it would cost more
// than deciding on a small batch.
#include "python_api.h"

#include <cstdint>
#include <optional>

#include "eager_tensors.h"
#include "exit_gate_cpu.h"

namespace {

using fastkd::Owned;

// releasing the lock of the interpreter costs about as much as this many elements
constexpr int64_t kElementsWorthUnlocking = 4096;

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
  if (!fastkd::view_tensor(logits, view) || view.ndim != 2 || view.shape[1] < 2 || view.shape[0] > INT32_MAX ||
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
      fastkd::allocate_tensor(gate.rows, kDLFloat, uncertainty), fastkd::allocate_tensor(gate.rows, kDLInt, survivors),
      fastkd::allocate_tensor(1, kDLInt, count)};
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
  if (count != 4 || fastkd::tensor_exchange == nullptr) {
    PyErr_SetString(
        PyExc_TypeError,
        "exit_gate: expected logits, speed, criterion and top_n, after a call of enable_eager_tensors");
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

PyObject* enable_eager_tensors(PyObject*, PyObject* capsule) {
  fastkd::tensor_exchange = exchange_of(capsule);
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(fastkd::tensor_exchange != nullptr);
}

PyMethodDef methods[] = {
    fastkd::method(
        "enable_eager_tensors", enable_eager_tensors, METH_O,
        "Give the eager functions the capsule torch.Tensor.__dlpack_c_exchange_api__; False where it cannot be used."),
    fastkd::method("exit_gate", exit_gate, METH_FASTCALL, "Eager CPU exit gate, after enable_eager_tensors."),
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
