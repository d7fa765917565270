// Python's limited API, all that csrc/ knows of Python: one binary serves CPython >= 3.10.
#pragma once

// here and not by a flag, which torch's builds set to the oldest Python that they know themselves
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000  // Python 3.10
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <memory>
#include <new>

namespace fastkd {

// Raised together with INTERFACE in fastkd_kernels/_extension.py whenever a schema or a binding changes.
constexpr int kInterface = 5;

struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};

// A reference that is owned; empty where Python has an error set.
using Owned = std::unique_ptr<PyObject, Release>;

// body(), whose exceptions become errors of Python.
template <typename Body>
PyObject* catching(const Body& body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// Lets other threads of Python run while it lives.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// A row of a table of functions.
template <typename Function>
PyMethodDef method(const char* name, Function* function, int flags, const char* text) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), flags, text};
}

}  // namespace fastkd
