// Whether modules still hold what they held, and whether tensors still say what they said, in one look at memory: the
// same in Python costs more than a layer on a short sentence. What it means: fastkd_kernels/_stamps.py.
#include "python_api.h"

#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

namespace {

using fastkd::Owned;

// Some place of a dictionary or list. A value that is itself one is null here: its `count` entries are those behind it.
struct Entry {
  PyObject* key;  // null in a list
  PyObject* value;
  Py_ssize_t count;
};

constexpr Py_ssize_t kAnything = -1;  // the `count` of a null that may change

struct Module {
  PyObject* module;
  PyTypeObject* type;
  std::vector<Entry> entries;
};

struct Parameter {
  PyObject* tensor;
  long long version;  // below 0: one that counts no changes
  long long address;
};

bool same_place(PyObject* dictionary, Py_ssize_t& position, const Entry& entry, PyObject*& value) {
  PyObject* key;
  return PyDict_Next(dictionary, &position, &key, &value) && key == entry.key;
}

// Python has an error set.
struct PythonError : std::exception {};

Owned checked(PyObject* object) {
  if (object == nullptr) throw PythonError();
  return Owned(object);
}

long long number(PyObject* given) {
  const Owned value = checked(given);
  const auto found = static_cast<long long>(PyLong_AsUnsignedLongLongMask(value.get()));
  if (found == -1 && PyErr_Occurred()) throw PythonError();
  return found;
}

// Pointers are compared, so everything pointed to is either kept or known to be alive.
class ModuleStamp {
 public:
  ModuleStamp(PyObject* modules, PyObject* tensors, PyObject* not_kept)
      : version_(checked(PyUnicode_InternFromString("_version"))),
        data_ptr_(checked(PyUnicode_InternFromString("data_ptr"))),
        gone_(checked(PyList_New(0))),
        append_(checked(PyObject_GetAttrString(gone_.get(), "append"))) {
    for (Py_ssize_t at = 0; at < PyList_Size(modules); ++at) add_module(PyList_GetItem(modules, at), not_kept);
    for (Py_ssize_t at = 0; at < PyList_Size(tensors); ++at) add_tensor(PyList_GetItem(tensors, at));
  }

  bool is_current() const {
    if (!all_alive()) return false;
    for (const Module& module : modules_) {
      if (Py_TYPE(module.module) != module.type || !holds(module)) return false;
    }
    for (const Parameter& parameter : parameters_) {
      if (parameter.version >= 0 && version_of(parameter.tensor) != parameter.version) return false;
      // a tensor of another class answers in Python, during which anything may go
      if (!all_alive() || address_of(parameter.tensor) != parameter.address || !all_alive()) return false;
    }
    return true;
  }

 private:
  bool all_alive() const { return PyList_Size(gone_.get()) == 0; }

  // the object's memory may be used again once `gone_` says so
  void watch(PyObject* object) { kept_.push_back(checked(PyWeakref_NewRef(object, append_.get()))); }

  void keep(PyObject* object) {
    Py_INCREF(object);
    kept_.emplace_back(object);
  }

  PyObject* marked(PyObject* object, PyObject* not_kept) {
    const int is_watched = PyObject_IsInstance(object, not_kept);
    if (is_watched < 0) throw PythonError();
    if (is_watched) {
      watch(object);
    } else {
      keep(object);
    }
    return object;
  }

  void add_entries(PyObject* dictionary, bool goes_deeper, PyObject* not_kept, std::vector<Entry>& entries) {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(dictionary, &position, &key, &value)) {
      keep(key);
      if (is_about_saving(key)) {
        entries.push_back({key, nullptr, kAnything});
      } else if (goes_deeper && PyDict_Check(value)) {
        entries.push_back({key, nullptr, PyDict_Size(value)});
        add_entries(value, false, not_kept, entries);
      } else if (goes_deeper && PyList_Check(value)) {
        entries.push_back({key, nullptr, PyList_Size(value)});
        for (Py_ssize_t at = 0; at < PyList_Size(value); ++at) {
          entries.push_back({nullptr, marked(PyList_GetItem(value, at), not_kept), 0});
        }
      } else {
        entries.push_back({key, marked(value, not_kept), 0});
      }
    }
  }

  // Hooks of state_dict and load_state_dict: they run outside of calls, and may hold the model that they belong to.
  static bool is_about_saving(PyObject* key) {
    const char* name = PyUnicode_Check(key) ? PyUnicode_AsUTF8AndSize(key, nullptr) : nullptr;
    if (name == nullptr) {
      PyErr_Clear();
      return false;
    }
    return std::strncmp(name, "_state_dict", 11) == 0 || std::strncmp(name, "_load_state_dict", 16) == 0;
  }

  void add_module(PyObject* module, PyObject* not_kept) {
    watch(module);
    keep(reinterpret_cast<PyObject*>(Py_TYPE(module)));
    const Owned dictionary = checked(PyObject_GenericGetDict(module, nullptr));
    Module seen{module, Py_TYPE(module), {}};
    add_entries(dictionary.get(), true, not_kept, seen.entries);
    modules_.push_back(std::move(seen));
  }

  void add_tensor(PyObject* tensor) {
    watch(tensor);
    const Owned is_inference = checked(PyObject_CallMethod(tensor, "is_inference", nullptr));
    const bool counts = PyObject_IsTrue(is_inference.get()) == 0;
    parameters_.push_back({tensor, counts ? version_of(tensor) : -1, address_of(tensor)});
  }

  static bool holds(const Module& module) {
    const Owned dictionary = checked(PyObject_GenericGetDict(module.module, nullptr));
    Py_ssize_t position = 0;
    PyObject* value;
    const Entry* const end = module.entries.data() + module.entries.size();
    for (const Entry* entry = module.entries.data(); entry != end;) {
      const Entry& seen = *entry++;
      if (!same_place(dictionary.get(), position, seen, value)) return false;
      if (seen.value != nullptr) {
        if (value != seen.value) return false;
      } else if (seen.count != kAnything) {
        if (!(PyDict_Check(value) ? same_dictionary(value, seen, entry) : same_list(value, seen, entry))) return false;
        entry += seen.count;
      }
    }
    PyObject* key;
    return !PyDict_Next(dictionary.get(), &position, &key, &value);
  }

  static bool same_dictionary(PyObject* value, const Entry& seen, const Entry* entries) {
    if (PyDict_Size(value) != seen.count) return false;
    Py_ssize_t position = 0;
    PyObject* held;
    for (Py_ssize_t at = 0; at < seen.count; ++at) {
      if (!same_place(value, position, entries[at], held) || held != entries[at].value) return false;
    }
    return true;
  }

  static bool same_list(PyObject* value, const Entry& seen, const Entry* entries) {
    if (!PyList_Check(value) || PyList_Size(value) != seen.count) return false;
    for (Py_ssize_t at = 0; at < seen.count; ++at) {
      if (entries[at].key != nullptr || PyList_GetItem(value, at) != entries[at].value) return false;
    }
    return true;
  }

  long long version_of(PyObject* tensor) const { return number(PyObject_GetAttr(tensor, version_.get())); }

  long long address_of(PyObject* tensor) const {
    return number(PyObject_CallMethodObjArgs(tensor, data_ptr_.get(), nullptr));
  }

  Owned version_, data_ptr_, gone_, append_;
  std::vector<Owned> kept_;
  std::vector<Module> modules_;
  std::vector<Parameter> parameters_;
};

constexpr const char* kCapsule = "fastkd_module_stamp";

ModuleStamp* stamp_of(PyObject* capsule) {
  return static_cast<ModuleStamp*>(PyCapsule_GetPointer(capsule, kCapsule));
}

template <typename Body>
PyObject* with_errors(const Body& body) {
  return fastkd::catching([&]() -> PyObject* {
    try {
      return body();
    } catch (const PythonError&) {
      return nullptr;
    }
  });
}

PyObject* module_stamp(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 3 || !PyList_Check(given[0]) || !PyList_Check(given[1])) {
    PyErr_SetString(
        PyExc_TypeError,
        "module_stamp: expected a list of modules, a list of tensors and a tuple of types to leave out");
    return nullptr;
  }
  return with_errors([&] {
    auto stamp = std::make_unique<ModuleStamp>(given[0], given[1], given[2]);
    PyObject* capsule = PyCapsule_New(stamp.get(), kCapsule, [](PyObject* held) { delete stamp_of(held); });
    if (capsule != nullptr) stamp.release();
    return capsule;
  });
}

PyObject* module_stamp_is_current(PyObject*, PyObject* capsule) {
  const ModuleStamp* stamp = stamp_of(capsule);
  if (stamp == nullptr) return nullptr;
  return with_errors([&] { return PyBool_FromLong(stamp->is_current()); });
}

PyMethodDef methods[] = {
    fastkd::method("module_stamp", module_stamp, METH_FASTCALL, "What modules hold and tensors say now."),
    fastkd::method("module_stamp_is_current", module_stamp_is_current, METH_O, "Whether they still do."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool bind_module_stamp(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}
