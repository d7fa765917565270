// The tokens of a padded batch, one sequence behind the other, with what the tables of an embedding are asked for: what
// a model does with its arguments before its first layer, without PyTorch's dispatcher.
#include "python_api.h"

#include <cstdint>
#include <limits>

#include "eager_tensors.h"

namespace {

// One of the arguments, [B, T] of whole numbers of some size.
struct Column {
  const char* data = nullptr;
  int64_t row_bytes = 0, token_bytes = 0, bytes = 0;

  bool open(PyObject* tensor, bool takes_small) {
    DLTensor view;
    if (!fastkd::view_tensor(tensor, view) || view.ndim != 2) return false;
    bytes = view.dtype.bits / 8;
    const bool whole = view.dtype.code == kDLInt || view.dtype.code == kDLUInt || view.dtype.code == kDLBool;
    if (!whole || !(bytes == 8 || (takes_small && (bytes == 1 || bytes == 4)))) return false;
    data = static_cast<const char*>(view.data) + view.byte_offset;
    rows = view.shape[0];
    tokens = view.shape[1];
    row_bytes = (view.strides ? view.strides[0] : tokens) * bytes;
    token_bytes = (view.strides ? view.strides[1] : 1) * bytes;
    return true;
  }

  int64_t at(int64_t row, int64_t token) const {
    return *reinterpret_cast<const int64_t*>(data + row * row_bytes + token * token_bytes);
  }

  bool is_set(int64_t row, int64_t token) const {
    const char* place = data + row * row_bytes + token * token_bytes;
    if (bytes == 1) return *place != 0;
    return bytes == 4 ? *reinterpret_cast<const int32_t*>(place) != 0 : *reinterpret_cast<const int64_t*>(place) != 0;
  }

  bool has_shape_of(const Column& other) const { return rows == other.rows && tokens == other.tokens; }

  int64_t rows = 0, tokens = 0;
};

// How many tokens of the row are set; -1 where the first is not, or one is behind another that is not.
int64_t length_of(const Column& mask, int64_t row) {
  int64_t length = 0;
  while (length < mask.tokens && mask.is_set(row, length)) ++length;
  for (int64_t token = length; token < mask.tokens; ++token) {
    if (mask.is_set(row, token)) return -1;
  }
  return length == 0 ? -1 : length;
}

// (input_ids [N], positions [N], token_type_ids [N], cu_seqlens [B + 1] int32, lengths), or None where the arguments
// need the care of somebody else, and of his errors.
PyObject* pack(const Column& ids, const Column* mask, const Column* segments, int64_t first_position) {
  using fastkd::allocate_tensor;
  const fastkd::Owned lengths(PyList_New(ids.rows));
  int32_t* bounds;
  const fastkd::Owned cu_seqlens = allocate_tensor(ids.rows + 1, kDLInt, bounds);
  if (!lengths || !cu_seqlens) return nullptr;
  bounds[0] = 0;
  for (int64_t row = 0; row < ids.rows; ++row) {
    const int64_t length = mask ? length_of(*mask, row) : ids.tokens;
    if (length < 0) Py_RETURN_NONE;
    PyObject* number = PyLong_FromLongLong(length);
    if (number == nullptr || PyList_SetItem(lengths.get(), row, number) != 0) return nullptr;
    bounds[row + 1] = bounds[row] + static_cast<int32_t>(length);
  }
  const int64_t total = bounds[ids.rows];
  int64_t *packed_ids, *positions, *packed_segments;
  const fastkd::Owned columns[] = {
      allocate_tensor(total, kDLInt, packed_ids), allocate_tensor(total, kDLInt, positions),
      allocate_tensor(total, kDLInt, packed_segments)};
  for (const fastkd::Owned& column : columns) {
    if (!column) return nullptr;
  }
  for (int64_t row = 0; row < ids.rows; ++row) {
    for (int64_t place = bounds[row], token = 0; place < bounds[row + 1]; ++place, ++token) {
      packed_ids[place] = ids.at(row, token);
      positions[place] = first_position + token;
      packed_segments[place] = segments ? segments->at(row, token) : 0;
    }
  }
  return PyTuple_Pack(
      5, columns[0].get(), columns[1].get(), columns[2].get(), cu_seqlens.get(), lengths.get());
}

// pack_tokens(input_ids, attention_mask, token_type_ids, first_position); mask and segments may be None.
PyObject* pack_tokens(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 4 || fastkd::tensor_exchange == nullptr) {
    PyErr_SetString(
        PyExc_TypeError,
        "pack_tokens: expected input_ids, attention_mask, token_type_ids and first_position, after a call of "
        "enable_eager_tensors");
    return nullptr;
  }
  const int64_t first_position = PyLong_AsLongLong(given[3]);
  if (PyErr_Occurred()) return nullptr;
  Column ids, mask, segments;
  if (!ids.open(given[0], false) || ids.rows == 0 || ids.tokens == 0) Py_RETURN_NONE;
  if (ids.rows * ids.tokens > std::numeric_limits<int32_t>::max()) Py_RETURN_NONE;
  const bool has_mask = given[1] != Py_None, has_segments = given[2] != Py_None;
  if (has_mask && !(mask.open(given[1], true) && mask.has_shape_of(ids))) Py_RETURN_NONE;
  if (has_segments && !(segments.open(given[2], false) && segments.has_shape_of(ids))) Py_RETURN_NONE;
  return fastkd::catching(
      [&] { return pack(ids, has_mask ? &mask : nullptr, has_segments ? &segments : nullptr, first_position); });
}

PyMethodDef methods[] = {
    fastkd::method(
        "pack_tokens", pack_tokens, METH_FASTCALL, "Pack a right-padded batch, after enable_eager_tensors."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool bind_pack_tokens(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}
