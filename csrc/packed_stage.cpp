// The layers up to an exit head, the head and its gate on packed rows, and before them the embedding, in one call of
// Python: what a short row pays for crossing PyTorch's dispatcher four times is more than its layer takes.
#include "python_api.h"

#include <optional>
#include <vector>

#include "eager_tensors.h"
#include "exit_gate_cpu.h"
#include "memory.h"
#include "packed_rows.h"

namespace {

using fastkd::Owned;
using fastkd::ScalarType;
using fastkd::TensorView;

// Python has an error set.
struct PythonError : std::exception {};

constexpr DLDataType kFloat32{kDLFloat, 32, 1}, kBFloat16{kDLBfloat, 16, 1};

ScalarType scalar_type(DLDataType type) {
  const auto is = [&](uint8_t code, int bits) { return type.code == code && type.bits == bits; };
  if (is(kDLFloat, 32)) return ScalarType::Float;
  if (is(kDLFloat, 16)) return ScalarType::Half;
  if (is(kDLBfloat, 16)) return ScalarType::BFloat16;
  if (is(kDLInt, 32)) return ScalarType::Int;
  if (is(kDLInt, 64)) return ScalarType::Long;
  return is(kDLUInt, 8) ? ScalarType::Byte : ScalarType::Undefined;
}

TensorView read(PyObject* tensor) {
  DLTensor view;
  STD_TORCH_CHECK(fastkd::view_tensor(tensor, view), "rows, weights: expected tensors on the CPU");
  return {
      static_cast<char*>(view.data) + view.byte_offset,
      scalar_type(view.dtype),
      view.dtype.bits / 8,
      true,
      view.ndim,
      view.shape,
      view.strides};
}

std::optional<TensorView> read_or_none(PyObject* tensor) {
  if (tensor == Py_None) return std::nullopt;
  return read(tensor);
}

std::vector<TensorView> read_list(PyObject* list) {
  std::vector<TensorView> views;
  for (Py_ssize_t at = 0; at < PyList_Size(list); ++at) views.push_back(read(PyList_GetItem(list, at)));
  return views;
}

bool is_tuple(PyObject* object, Py_ssize_t size) {
  return PyTuple_Check(object) && PyTuple_Size(object) == size;
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

Owned checked(Owned object) {
  if (!object) throw PythonError();
  return object;
}

// (tables, indices, weight, bias, epsilon)
struct Embedding {
  std::vector<TensorView> tables, indices;
  TensorView weight;
  std::optional<TensorView> bias;
  double epsilon;

  explicit Embedding(PyObject* given)
      : tables(read_list(PyTuple_GetItem(given, 0))),
        indices(read_list(PyTuple_GetItem(given, 1))),
        weight(read(PyTuple_GetItem(given, 2))),
        bias(read_or_none(PyTuple_GetItem(given, 3))),
        epsilon(number(PyTuple_GetItem(given, 4))) {
    STD_TORCH_CHECK(!indices.empty() && indices[0].dim() == 1 && weight.dim() == 1, "indices: expected [N] for each table");
  }
};

// (narrow, bias of narrow, heads, six folded weights)
struct Head {
  TensorView narrow, narrow_bias;
  fastkd::student_head::Folded folded;

  explicit Head(PyObject* given)
      : narrow(item(given, 0)),
        narrow_bias(item(given, 1)),
        folded{
            integer(PyTuple_GetItem(given, 2)), item(given, 3), item(given, 4), item(given, 5), item(given, 6),
            item(given, 7), item(given, 8)} {
    STD_TORCH_CHECK(folded.classifier.dim() == 2, "classifier: expected [C, D]");
  }

 private:
  static TensorView item(PyObject* given, Py_ssize_t at) {
    return read(PyTuple_GetItem(given, at));
  }
};

// (logits, uncertainty, exit_layer, history, row_ids or None, layer)
std::optional<fastkd::RecordViews> read_record(PyObject* given) {
  if (given == Py_None) return std::nullopt;
  const auto item = [&](Py_ssize_t at) { return PyTuple_GetItem(given, at); };
  return fastkd::RecordViews{
      read(item(0)), read(item(1)), read(item(2)), read(item(3)), read_or_none(item(4)), integer(item(5))};
}

PyObject* run(PyObject* const* given) {
  std::optional<Embedding> embedding;
  std::optional<TensorView> entered;
  if (PyTuple_Check(given[0])) {
    embedding.emplace(given[0]);
  } else {
    entered.emplace(read(given[0]));
    STD_TORCH_CHECK(entered->dim() == 2, "hidden_states: expected [R, H]");
  }
  const std::vector<TensorView> layers = read_list(given[1]), rotary = read_list(given[2]);
  const Head head(given[3]);
  const TensorView cu_seqlens = read(given[4]);
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1, "cu_seqlens: expected [B + 1]");
  const bool has_speeds = !PyFloat_Check(given[5]);
  const double speed = has_speeds ? 0.0 : number(given[5]);
  const std::optional<TensorView> speeds = has_speeds ? read_or_none(given[5]) : std::nullopt;
  const std::optional<fastkd::RecordViews> record_views = read_record(given[8]);

  const TensorView& like = embedding ? embedding->weight : *entered;
  const ScalarType type = like.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16, "hidden_states: expected float32 or bfloat16");
  const int64_t sizes[] = {embedding ? embedding->indices[0].size(0) : entered->size(0), like.size(like.dim() - 1)};
  const int64_t item = type == ScalarType::Float ? 4 : 2;
  const int64_t batch = cu_seqlens.numel() - 1, classes = head.folded.classifier.size(0);

  void *hidden_memory, *logits_memory;
  float* uncertainty;
  const Owned hidden_states = checked(
      fastkd::allocate_tensor({sizes[0], sizes[1]}, type == ScalarType::Float ? kFloat32 : kBFloat16, hidden_memory));
  const Owned logits = checked(fastkd::allocate_tensor({batch, classes}, kFloat32, logits_memory));
  const Owned uncertainties = checked(fastkd::allocate_tensor(batch, kDLFloat, uncertainty));
  std::vector<int32_t> survivors(batch);
  int32_t count = 0;

  const int64_t logits_sizes[] = {batch, classes};
  const TensorView left(hidden_memory, type, item, true, 2, sizes, nullptr);
  fastkd::ExitGate gate = fastkd::checked_gate(
      {logits_memory, ScalarType::Float, 4, true, 2, logits_sizes, nullptr}, speed, integer(given[6]), integer(given[7]),
      speeds);
  STD_TORCH_CHECK(gate.criterion != fastkd::kPatience || record_views, "criterion: patience needs a record");
  fastkd::ExitRecord record{};
  if (record_views) {
    record = fastkd::checked_record(gate, *record_views);
    gate.record = &record;
  }
  {
    const fastkd::Unlocked unlocked;
    static thread_local fastkd::Arena arena;
    if (embedding) {
      entered.emplace(arena.take(sizes[0] * sizes[1] * item), type, item, true, 2, sizes, nullptr);
      fastkd::layer_norm::embed_layer_norm(
          embedding->tables, embedding->indices, embedding->weight, embedding->bias, embedding->epsilon, *entered);
    }
    fastkd::encoder_layer::encoder_layers(*entered, cu_seqlens, layers, rotary, left);
    fastkd::student_head::student_head_packed(
        left, head.narrow, head.narrow_bias, head.folded, cu_seqlens, static_cast<float*>(logits_memory));
    fastkd::exit_gate(gate, uncertainty, survivors.data(), &count);
  }
  const Owned staying = checked(Owned(PyList_New(count)));
  for (int32_t k = 0; k < count; ++k) {
    if (PyList_SetItem(staying.get(), k, checked(Owned(PyLong_FromLong(survivors[k]))).release()) != 0) return nullptr;
  }
  return PyTuple_Pack(4, hidden_states.get(), logits.get(), uncertainties.get(), staying.get());
}

PyObject* packed_stage(PyObject*, PyObject* const* given, Py_ssize_t count) {
  const bool is_called_well = count == 9 && fastkd::tensor_exchange != nullptr &&
      (!PyTuple_Check(given[0]) || (is_tuple(given[0], 5) && PyList_Check(PyTuple_GetItem(given[0], 0)) &&
                                    PyList_Check(PyTuple_GetItem(given[0], 1)))) &&
      PyList_Check(given[1]) && PyList_Check(given[2]) && is_tuple(given[3], 9) &&
      (given[8] == Py_None || is_tuple(given[8], 6));
  if (!is_called_well) {
    PyErr_SetString(
        PyExc_TypeError,
        "packed_stage: rows or an embedding of five, layers, rotary, a head of nine, cu_seqlens, speed, criterion, top_n, "
        "None or a record of six, after enable_eager_tensors");
    return nullptr;
  }
  return fastkd::catching([&]() -> PyObject* {
    try {
      return run(given);
    } catch (const PythonError&) {
      return nullptr;
    }
  });
}

PyMethodDef methods[] = {
    fastkd::method(
        "packed_stage", packed_stage, METH_FASTCALL, "Layers, head and gate of packed rows, after enable_eager_tensors."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool bind_packed_stage(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}
