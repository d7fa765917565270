// The CPU exit gate called straight from Python: PyTorch's dispatcher and three allocations through it would cost more
// than deciding on a small batch. Tensors cross by DLPack's C exchange interface, whose ABI is stable.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>

#include "dlpack_exchange.h"
#include "exit_gate_cpu.h"

namespace py = pybind11;

namespace {

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

// A new tensor [size] of 4-byte elements; `data` receives its memory.
template <typename T>
py::object allocate(int64_t size, uint8_t type_code, T*& data) {
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
  if (exchange->managed_tensor_to_py_object_no_sync(&header->tensor, &object) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
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

// (uncertainty, survivors, count), or None where the arguments need the care of the dispatcher and of its errors.
py::object exit_gate(py::handle logits, double speed, int64_t criterion, int64_t top_n) {
  DLTensor view;
  if (exchange->dltensor_from_py_object_no_sync(logits.ptr(), &view) != 0) {
    PyErr_Clear();
    return py::none();
  }
  fastkd::ExitGate gate{};
  if (view.device.device_type != kDLCPU || view.ndim != 2 || view.shape[1] < 2 || view.shape[0] > INT32_MAX ||
      !logits_type(view.dtype, gate.type)) {
    return py::none();
  }
  const bool known = fastkd::is_valid(criterion, top_n, view.shape[1]) && criterion != fastkd::kPatience;
  if (!known || !(speed >= 0 && speed <= 1)) return py::none();
  gate.logits = static_cast<const char*>(view.data) + view.byte_offset;
  gate.rows = view.shape[0];
  gate.columns = view.shape[1];
  gate.row_stride = view.strides ? view.strides[0] : view.shape[1];
  gate.column_stride = view.strides ? view.strides[1] : 1;
  gate.criterion = static_cast<fastkd::Criterion>(criterion);
  gate.top_n = top_n;
  gate.speed = static_cast<float>(speed);

  float* uncertainty;
  int32_t *survivors, *count;
  py::tuple decision(3);
  decision[0] = allocate(gate.rows, kDLFloat, uncertainty);
  decision[1] = allocate(gate.rows, kDLInt, survivors);
  decision[2] = allocate(1, kDLInt, count);
  std::optional<py::gil_scoped_release> unlocked;
  if (gate.rows * gate.columns > kElementsWorthUnlocking) unlocked.emplace();
  fastkd::exit_gate(gate, uncertainty, survivors, count);
  unlocked.reset();
  return std::move(decision);
}

}  // namespace

void bind_exit_gate(py::module_& module) {
  module.attr("criteria") = py::tuple(py::cast(fastkd::kCriterionNames));
  module.def(
      "enable_eager_exit_gate",
      [](py::capsule api) {
        exchange = exchange_of(api);
        return exchange != nullptr;
      },
      "Give exit_gate the capsule torch.Tensor.__dlpack_c_exchange_api__; False where it cannot be used.");
  module.def("exit_gate", &exit_gate, "Eager CPU exit gate, after enable_eager_exit_gate.");
}
