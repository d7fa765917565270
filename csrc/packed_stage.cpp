// The layers up to an exit head, the head and its gate on packed rows, and before them the embedding, in one call of
// Python: what a short row pays for crossing PyTorch's dispatcher four times is more than its layer takes. And all such
// stages of a model in one call, which drops the rows that leave between them.
#include "python_api.h"

#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>
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
    STD_TORCH_CHECK(
        !indices.empty() && indices[0].dim() == 1 && weight.dim() == 1, "indices: expected one [N] for each table");
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

// (layers, rotary, head)
struct Stage {
  std::vector<TensorView> layers, rotary;
  Head head;

  explicit Stage(PyObject* given)
      : layers(read_list(PyTuple_GetItem(given, 0))),
        rotary(read_list(PyTuple_GetItem(given, 1))),
        head(PyTuple_GetItem(given, 2)) {}

  static bool is_one(PyObject* given) {
    return is_tuple(given, 3) && PyList_Check(PyTuple_GetItem(given, 0)) && PyList_Check(PyTuple_GetItem(given, 1)) &&
        is_tuple(PyTuple_GetItem(given, 2), 9);
  }

  int64_t classes() const {
    return head.folded.classifier.size(0);
  }

  void run(const TensorView& entered, const TensorView& cu_seqlens, const TensorView& left, float* logits) const {
    fastkd::encoder_layer::encoder_layers(entered, cu_seqlens, layers, rotary, left);
    fastkd::student_head::student_head_packed(left, head.narrow, head.narrow_bias, head.folded, cu_seqlens, logits);
  }
};

// What the first layer is given: hidden states [R, H], or what the embedding is asked for them.
struct Rows {
  std::optional<Embedding> embedding;
  std::optional<TensorView> states;
  ScalarType type;
  int64_t count, width;

  explicit Rows(PyObject* given) {
    if (PyTuple_Check(given)) {
      embedding.emplace(given);
    } else {
      states.emplace(read(given));
      STD_TORCH_CHECK(states->dim() == 2, "hidden_states: expected [R, H]");
    }
    const TensorView& like = embedding ? embedding->weight : *states;
    type = like.scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::Float || type == ScalarType::BFloat16, "hidden_states: expected float32 or bfloat16");
    count = embedding ? embedding->indices[0].size(0) : states->size(0);
    width = like.size(like.dim() - 1);
  }

  static bool are_some(PyObject* given) {
    return !PyTuple_Check(given) || (is_tuple(given, 5) && PyList_Check(PyTuple_GetItem(given, 0)) &&
                                     PyList_Check(PyTuple_GetItem(given, 1)));
  }

  int64_t item() const {
    return type == ScalarType::Float ? 4 : 2;
  }

  int64_t bytes() const {
    return count * width * item();
  }

  // `sizes` outlive the view.
  TensorView view(void* memory, const int64_t* sizes) const {
    return {memory, type, item(), true, 2, sizes, nullptr};
  }

  // The hidden states; those of an embedding are written to `memory`.
  TensorView enter(char* memory, const int64_t* sizes) const {
    if (!embedding) return *states;
    const TensorView entered = view(memory, sizes);
    fastkd::layer_norm::embed_layer_norm(
        embedding->tables, embedding->indices, embedding->weight, embedding->bias, embedding->epsilon, entered);
    return entered;
  }
};

// (logits, uncertainty, exit_layer, history, row_ids or None, layer)
std::optional<fastkd::RecordViews> read_record(PyObject* given) {
  if (given == Py_None) return std::nullopt;
  const auto item = [&](Py_ssize_t at) { return PyTuple_GetItem(given, at); };
  return fastkd::RecordViews{
      read(item(0)), read(item(1)), read(item(2)), read(item(3)), read_or_none(item(4)), integer(item(5))};
}

TensorView float_logits(float* memory, const int64_t* sizes) {
  return {memory, ScalarType::Float, 4, true, 2, sizes, nullptr};
}

// rows, stage, cu_seqlens, speed, criterion, top_n, record
PyObject* run_stage(PyObject* const* given) {
  const Rows rows(given[0]);
  const Stage stage(given[1]);
  const TensorView cu_seqlens = read(given[2]);
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1, "cu_seqlens: expected [B + 1]");
  const bool has_speeds = !PyFloat_Check(given[3]);
  const double speed = has_speeds ? 0.0 : number(given[3]);
  const std::optional<TensorView> speeds = has_speeds ? read_or_none(given[3]) : std::nullopt;
  const std::optional<fastkd::RecordViews> record_views = read_record(given[6]);
  const int64_t sizes[] = {rows.count, rows.width}, logits_sizes[] = {cu_seqlens.numel() - 1, stage.classes()};

  void *hidden_memory, *logits_memory;
  float* uncertainty;
  const Owned hidden_states = checked(fastkd::allocate_tensor(
      {rows.count, rows.width}, rows.type == ScalarType::Float ? kFloat32 : kBFloat16, hidden_memory));
  const Owned logits = checked(fastkd::allocate_tensor({logits_sizes[0], logits_sizes[1]}, kFloat32, logits_memory));
  const Owned uncertainties = checked(fastkd::allocate_tensor(logits_sizes[0], kDLFloat, uncertainty));
  std::vector<int32_t> survivors(logits_sizes[0]);
  int32_t count = 0;

  auto* const values = static_cast<float*>(logits_memory);
  fastkd::ExitGate gate =
      fastkd::checked_gate(float_logits(values, logits_sizes), speed, integer(given[4]), integer(given[5]), speeds);
  STD_TORCH_CHECK(gate.criterion != fastkd::kPatience || record_views, "criterion: 'patience' needs a record");
  fastkd::ExitRecord record{};
  if (record_views) {
    record = fastkd::checked_record(gate, *record_views);
    gate.record = &record;
  }
  {
    const fastkd::Unlocked unlocked;
    static thread_local fastkd::Arena arena;
    const TensorView entered = rows.enter(rows.embedding ? arena.take(rows.bytes()) : nullptr, sizes);
    stage.run(entered, cu_seqlens, rows.view(hidden_memory, sizes), values);
    fastkd::exit_gate(gate, uncertainty, survivors.data(), &count);
  }
  const Owned staying = checked(Owned(PyList_New(count)));
  for (int32_t k = 0; k < count; ++k) {
    if (PyList_SetItem(staying.get(), k, checked(Owned(PyLong_FromLong(survivors[k]))).release()) != 0) return nullptr;
  }
  return PyTuple_Pack(4, hidden_states.get(), logits.get(), uncertainties.get(), staying.get());
}

// The sequences of a run that have not left.
struct Waiting {
  std::vector<int32_t> bounds;   // [K + 1] of their tokens
  std::vector<int32_t> row_ids;  // [K]
  std::vector<int32_t> survivors;
  std::vector<float> uncertainty;

  explicit Waiting(const TensorView& cu_seqlens) {
    STD_TORCH_CHECK(
        cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1 && cu_seqlens.scalar_type() == ScalarType::Int &&
            cu_seqlens.is_contiguous(),
        "cu_seqlens: expected contiguous int32 [B + 1]");
    const auto* given = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
    bounds.assign(given, given + cu_seqlens.numel());
    row_ids.resize(count());
    std::iota(row_ids.begin(), row_ids.end(), 0);
    survivors.resize(count());
    uncertainty.resize(count());
  }

  int64_t count() const {
    return static_cast<int64_t>(bounds.size()) - 1;
  }

  // Keeps the first `kept` survivors, whose rows move to the front of `states`.
  void keep(int32_t kept, char* states, int64_t row_bytes) {
    if (kept == count()) return;
    int32_t end = 0;
    for (int32_t k = 0; k < kept; ++k) {
      const int32_t first = bounds[survivors[k]], tokens = bounds[survivors[k] + 1] - first;
      if (first != end) std::memmove(states + end * row_bytes, states + first * row_bytes, tokens * row_bytes);
      row_ids[k] = row_ids[survivors[k]];
      bounds[k] = end;
      end += tokens;
    }
    bounds[kept] = end;
    bounds.resize(kept + 1);
  }
};

// What a run answers, and what its gates remember.
struct Answers {
  Owned logits, uncertainty, exit_layer;
  std::vector<int32_t> history;
  fastkd::ExitRecord record{};

  Answers(int64_t batch, int64_t classes) : history(2 * batch) {
    void* logits_memory;
    logits = checked(fastkd::allocate_tensor({batch, classes}, kFloat32, logits_memory));
    record.logits = static_cast<float*>(logits_memory);
    uncertainty = checked(fastkd::allocate_tensor(batch, kDLFloat, record.uncertainty));
    exit_layer = checked(fastkd::allocate_tensor(batch, kDLInt, record.exit_layer));
    for (int64_t row = 0; row < batch; ++row) history[2 * row] = -1;
    record.history = history.data();
  }

  // Answers every row that waits, whatever its uncertainty.
  void write_all(const Waiting& waiting, const float* from, int64_t classes) const {
    for (int64_t row = 0; row < waiting.count(); ++row) {
      const int64_t id = waiting.row_ids[row];
      std::memcpy(record.logits + id * classes, from + row * classes, classes * sizeof(float));
      record.uncertainty[id] = waiting.uncertainty[row];
      record.exit_layer[id] = static_cast<int32_t>(record.layer);
    }
  }
};

// A stage of a run, and where it lies.
struct Step {
  Stage stage;
  double threshold;  // 0 behind the last
  int64_t layer;
};

// Takes sequences through all steps, while Python runs on; whether a head gave a NaN.
bool run_through(
    const std::vector<Step>& steps, const Rows& rows, int64_t criterion, int64_t top_n, Waiting& waiting, Answers& answers) {
  static thread_local fastkd::Arena arena;
  char* from = arena.take(2 * rows.bytes());
  char* to = from + rows.bytes();
  const int64_t classes = steps[0].stage.classes();
  std::vector<float> logits(waiting.count() * classes);
  bool has_nan = false;
  for (size_t s = 0; s < steps.size() && waiting.count() > 0; ++s) {
    const int64_t logits_sizes[] = {waiting.count(), classes}, bounds_sizes[] = {waiting.count() + 1};
    const int64_t sizes[] = {s == 0 ? rows.count : waiting.bounds.back(), rows.width};
    const TensorView cu_seqlens(waiting.bounds.data(), ScalarType::Int, 4, true, 1, bounds_sizes, nullptr);
    const TensorView entered = s == 0 ? rows.enter(from, sizes) : rows.view(from, sizes);
    steps[s].stage.run(entered, cu_seqlens, rows.view(to, sizes), logits.data());
    answers.record.layer = steps[s].layer;
    answers.record.row_ids = waiting.row_ids.data();
    fastkd::ExitGate gate = fastkd::checked_gate(
        float_logits(logits.data(), logits_sizes), steps[s].threshold, criterion, top_n, std::nullopt);
    gate.record = &answers.record;
    int32_t kept = 0;
    fastkd::exit_gate(gate, waiting.uncertainty.data(), waiting.survivors.data(), &kept);
    for (int64_t row = 0; row < waiting.count(); ++row) has_nan |= std::isnan(waiting.uncertainty[row]);
    if (s + 1 == steps.size()) {
      answers.write_all(waiting, logits.data(), classes);
    } else {
      waiting.keep(kept, to, rows.width * rows.item());
    }
    std::swap(from, to);
  }
  return has_nan;
}

// rows, stages, cu_seqlens, thresholds, layers, criterion, top_n
PyObject* run_stages(PyObject* const* given) {
  const Rows rows(given[0]);
  Waiting waiting(read(given[2]));
  const int64_t criterion = integer(given[5]), top_n = integer(given[6]);
  std::vector<Step> steps;
  for (Py_ssize_t s = 0; s < PyTuple_Size(given[1]); ++s) {
    const bool is_last = s == PyTuple_Size(given[3]);
    steps.push_back(
        {Stage(PyTuple_GetItem(given[1], s)), is_last ? 0.0 : number(PyTuple_GetItem(given[3], s)),
         integer(PyTuple_GetItem(given[4], s))});
    STD_TORCH_CHECK(
        steps[s].stage.classes() == steps[0].stage.classes(),
        "stages: expected the same number of classes in every head");
  }
  Answers answers(waiting.count(), steps[0].stage.classes());
  bool has_nan;
  {
    const fastkd::Unlocked unlocked;
    has_nan = run_through(steps, rows, criterion, top_n, waiting, answers);
  }
  return PyTuple_Pack(
      4, answers.logits.get(), answers.uncertainty.get(), answers.exit_layer.get(), has_nan ? Py_True : Py_False);
}

// `body(given)` of a call that is one, else `expected` as a TypeError.
template <typename Body>
PyObject* called(bool is_called_well, const char* expected, const Body& body) {
  if (!is_called_well) {
    PyErr_SetString(PyExc_TypeError, expected);
    return nullptr;
  }
  return fastkd::catching([&]() -> PyObject* {
    try {
      return body();
    } catch (const PythonError&) {
      return nullptr;
    }
  });
}

PyObject* packed_stage(PyObject*, PyObject* const* given, Py_ssize_t count) {
  const bool is_called_well = count == 7 && fastkd::tensor_exchange != nullptr && Rows::are_some(given[0]) &&
      Stage::is_one(given[1]) && (given[6] == Py_None || is_tuple(given[6], 6));
  return called(
      is_called_well,
      "packed_stage: expected rows (or an embedding of 5 parts), a stage (layers, rotary and a head of 9 parts), "
      "cu_seqlens, speed, criterion, top_n, and a record of 6 parts or None, after a call of enable_eager_tensors",
      [&] { return run_stage(given); });
}

PyObject* packed_run(PyObject*, PyObject* const* given, Py_ssize_t count) {
  bool is_called_well = count == 7 && fastkd::tensor_exchange != nullptr && Rows::are_some(given[0]) &&
      PyTuple_Check(given[1]) && PyTuple_Size(given[1]) > 0;
  for (Py_ssize_t s = 0; is_called_well && s < PyTuple_Size(given[1]); ++s) {
    is_called_well = Stage::is_one(PyTuple_GetItem(given[1], s));
  }
  is_called_well = is_called_well && is_tuple(given[3], PyTuple_Size(given[1]) - 1) &&
      is_tuple(given[4], PyTuple_Size(given[1]));
  return called(
      is_called_well,
      "packed_run: expected rows (or an embedding of 5 parts), stages as in packed_stage, cu_seqlens, a threshold for "
      "each stage but the last, a layer for each stage, criterion and top_n, after a call of enable_eager_tensors",
      [&] { return run_stages(given); });
}

PyMethodDef methods[] = {
    fastkd::method(
        "packed_stage", packed_stage, METH_FASTCALL, "Layers, head and gate of packed rows, after enable_eager_tensors."),
    fastkd::method("packed_run", packed_run, METH_FASTCALL, "Stages of packed rows, after enable_eager_tensors."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool bind_packed_stage(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}
