// Launches compiled Triton kernels straight through the CUDA driver. Triton's own launcher finds out anew at every call,
// in Python, which binary fits the arguments, and takes longer than a small kernel; here that is one look-up. A key says
// at least as much about the arguments as Triton asks, so it leads to the binary that Triton would have launched.
#include "python_api.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>

#include "dlpack_exchange.h"

namespace {

constexpr Py_ssize_t kMostArguments = 96;

// The part of the driver that is needed; its ABI is stable, and no header of it has to be there to build this.
struct Driver {
  int (*get_context)(void** context) = nullptr;
  int (*get_parameter)(void* function, size_t index, size_t* offset, size_t* size) = nullptr;
  int (*get_error)(int code, const char** text) = nullptr;
  int (*launch)(
      void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
      unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra) = nullptr;
};

const DLPackExchangeAPI* exchange = nullptr;
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
Driver driver;

// What becomes of an argument: compiled in, or a parameter of so many bytes.
enum Kind : char { kCompiledIn = '-', kPointer = 'p', kInt32 = '4', kInt64 = '8', kFloat32 = 'f' };

struct Binary {
  void* function;
  unsigned threads, shared_bytes;
  std::string kinds;
};

using Binaries = std::unordered_map<std::string, Binary>;

// The arguments of one call as the driver takes them, and the key of their binary.
struct Call {
  std::string key;
  char tags[kMostArguments];
  uint64_t values[kMostArguments];
  Py_ssize_t size = 0;
};

template <typename T>
void append(std::string& key, T value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

bool add_tensor(PyObject* argument, DLDevice device, Call& call) {
  DLTensor view;
  if (exchange->dltensor_from_py_object_no_sync(argument, &view) != 0) {
    PyErr_Clear();
    return false;
  }
  if (view.device.device_type != device.device_type || view.device.device_id != device.device_id) return false;
  const uint64_t address = reinterpret_cast<uint64_t>(view.data) + view.byte_offset;
  append(call.key, view.dtype);
  call.key += address % 16 == 0 ? 'D' : '.';
  call.tags[call.size] = 'T';
  call.values[call.size++] = address;
  return true;
}

bool add_integer(PyObject* argument, Call& call) {
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(argument, &overflow);
  if (overflow != 0) return false;
  call.key += value >= INT32_MIN && value <= INT32_MAX ? 'i' : 'l';
  call.key += value == 1 ? '1' : value % 16 == 0 ? 'D' : '.';
  call.tags[call.size] = 'I';
  call.values[call.size++] = static_cast<uint64_t>(value);
  return true;
}

bool add_argument(PyObject* argument, DLDevice device, Call& call) {
  PyTypeObject* type = Py_TYPE(argument);
  if (type == tensor_type || type == parameter_type) return add_tensor(argument, device, call);
  if (type == &PyLong_Type) return add_integer(argument, call);
  if (type == &PyFloat_Type) {
    const float value = static_cast<float>(PyFloat_AsDouble(argument));
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    call.key += call.tags[call.size] = 'F';
    call.values[call.size++] = bits;
    return true;
  }
  if (argument != Py_None) return false;
  call.key += call.tags[call.size] = 'N';
  call.values[call.size++] = 0;
  return true;
}

bool append_text(PyObject* text, std::string& key) {
  Py_ssize_t size;
  const char* bytes = PyUnicode_AsUTF8AndSize(text, &size);
  if (bytes == nullptr) {
    PyErr_Clear();
    return false;
  }
  append(key, size);
  key.append(bytes, size);
  return true;
}

bool append_constant(PyObject* value, std::string& key) {
  if (value == Py_None || value == Py_True || value == Py_False) {
    key += value == Py_None ? 'N' : value == Py_True ? 'Y' : 'n';
    return true;
  }
  if (PyLong_CheckExact(value)) {
    int overflow = 0;
    key += 'I';
    append(key, PyLong_AsLongLongAndOverflow(value, &overflow));
    return overflow == 0;
  }
  key += 'S';
  return PyUnicode_CheckExact(value) && append_text(value, key);
}

// False where something is not understood; then it is Triton's own launcher's.
bool read_call(PyObject* arguments, PyObject* constants, DLDevice device, Call& call) {
  if (PyTuple_Size(arguments) > kMostArguments) return false;
  call.key.reserve(512);
  append(call.key, device);
  for (Py_ssize_t index = 0; index < PyTuple_Size(arguments); ++index) {
    if (!add_argument(PyTuple_GetItem(arguments, index), device, call)) return false;
  }
  PyObject *name, *value;
  for (Py_ssize_t position = 0; PyDict_Next(constants, &position, &name, &value);) {
    if (!append_text(name, call.key) || !append_constant(value, call.key)) return false;
  }
  return true;
}

void raise_driver_error(int code) {
  const char* text = nullptr;
  driver.get_error(code, &text);
  PyErr_Format(PyExc_RuntimeError, "launching a Triton kernel: CUDA error %d, %s", code, text ? text : "unknown");
}

Binaries* binaries_of(PyObject* capsule) {
  return static_cast<Binaries*>(PyCapsule_GetPointer(capsule, nullptr));
}

// launch_triton(binaries, device_type, device_index, stream, (grid_x, grid_y), arguments, constants) -> bool
PyObject* launch_triton(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 7 || !PyTuple_Check(given[4]) || !PyTuple_Check(given[5]) || !PyDict_Check(given[6])) {
    PyErr_SetString(PyExc_TypeError, "launch_triton: expected binaries, device type, device index, stream, "
                                     "grid, arguments and constants");
    return nullptr;
  }
  Binaries* binaries = binaries_of(given[0]);
  if (binaries == nullptr) return nullptr;
  const DLDevice device{
      static_cast<DLDeviceType>(PyLong_AsLong(given[1])), static_cast<int32_t>(PyLong_AsLong(given[2]))};
  void* stream = PyLong_AsVoidPtr(given[3]);
  unsigned grid[2] = {1, 1};
  for (Py_ssize_t axis = 0; axis < PyTuple_Size(given[4]) && axis < 2; ++axis) {
    grid[axis] = static_cast<unsigned>(PyLong_AsUnsignedLong(PyTuple_GetItem(given[4], axis)));
  }
  if (PyErr_Occurred()) return nullptr;

  Call call;
  if (!read_call(given[5], given[6], device, call)) Py_RETURN_FALSE;
  const auto found = binaries->find(call.key);
  if (found == binaries->end()) Py_RETURN_FALSE;
  const Binary& binary = found->second;
  void* context = nullptr;
  // a thread without a context gets one from Triton's own launcher
  if (driver.get_context(&context) != 0 || context == nullptr) Py_RETURN_FALSE;
  if (grid[0] == 0 || grid[1] == 0) Py_RETURN_TRUE;

  uint64_t no_scratch = 0;
  void* parameters[kMostArguments + 2];
  size_t used = 0;
  for (Py_ssize_t index = 0; index < call.size; ++index) {
    if (binary.kinds[index] != kCompiledIn) parameters[used++] = &call.values[index];
  }
  parameters[used++] = &no_scratch;
  parameters[used++] = &no_scratch;
  // copied, because another thread may remember the binary anew while this one has given up the lock of the interpreter
  void* const function = binary.function;
  const unsigned threads = binary.threads, shared_bytes = binary.shared_bytes;
  int code;
  // a full queue makes the driver wait
  Py_BEGIN_ALLOW_THREADS;
  code = driver.launch(function, grid[0], grid[1], 1, threads, 1, 1, shared_bytes, stream, parameters, nullptr);
  Py_END_ALLOW_THREADS;
  if (code != 0) {
    raise_driver_error(code);
    return nullptr;
  }
  Py_RETURN_TRUE;
}

bool matches(char tag, char kind) {
  switch (kind) {
    case kPointer: return tag == 'T';
    case kInt32:
    case kInt64: return tag == 'I';
    case kFloat32: return tag == 'F';
    default: return kind == kCompiledIn;
  }
}

// Whether the driver says that the kernel takes just these parameters and Triton's two pointers to scratch memory.
bool takes(void* function, const std::string& kinds) {
  size_t index = 0, offset = 0, size = 0;
  for (const char kind : kinds + "pp") {
    if (kind == kCompiledIn) continue;
    const size_t expected = kind == kInt32 || kind == kFloat32 ? 4 : 8;
    if (driver.get_parameter(function, index++, &offset, &size) != 0 || size != expected) return false;
  }
  return driver.get_parameter(function, index, &offset, &size) != 0;
}

// The kernel of these arguments, if it can be launched this way and was not known.
bool remember(Binaries& binaries, DLDevice device, const Binary& binary, PyObject* arguments, PyObject* constants) {
  Call call;
  if (!read_call(arguments, constants, device, call)) return false;
  if (static_cast<Py_ssize_t>(binary.kinds.size()) != call.size) return false;
  for (Py_ssize_t index = 0; index < call.size; ++index) {
    if (!matches(call.tags[index], binary.kinds[index])) return false;
  }
  return takes(binary.function, binary.kinds) && binaries.insert_or_assign(call.key, binary).second;
}

// remember_triton(binaries, device_type, device_index, function, threads, shared_bytes, kinds, arguments, constants) -> bool
PyObject* remember_triton(PyObject*, PyObject* given) {
  PyObject *capsule, *arguments, *constants;
  int device_type, device_index;
  unsigned long long function;
  unsigned threads, shared_bytes;
  const char* kinds;
  if (!PyArg_ParseTuple(
          given, "OiiKIIsO!O!:remember_triton", &capsule, &device_type, &device_index, &function, &threads, &shared_bytes,
          &kinds, &PyTuple_Type, &arguments, &PyDict_Type, &constants)) {
    return nullptr;
  }
  Binaries* binaries = binaries_of(capsule);
  if (binaries == nullptr) return nullptr;
  const DLDevice device{static_cast<DLDeviceType>(device_type), device_index};
  return fastkd::catching([&] {
    const Binary binary{reinterpret_cast<void*>(static_cast<uintptr_t>(function)), threads, shared_bytes, kinds};
    return PyBool_FromLong(remember(*binaries, device, binary, arguments, constants));
  });
}

PyObject* new_triton_binaries(PyObject*, PyObject*) {
  return fastkd::catching([] {
    auto binaries = std::make_unique<Binaries>();
    PyObject* capsule =
        PyCapsule_New(binaries.get(), nullptr, [](PyObject* capsule) { delete binaries_of(capsule); });
    if (capsule != nullptr) binaries.release();
    return capsule;
  });
}

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

// The functions of the driver; false where it is too old, or missing.
bool find_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  return library != nullptr && find(library, "cuCtxGetCurrent", driver.get_context) &&
      find(library, "cuFuncGetParamInfo", driver.get_parameter) &&
      find(library, "cuGetErrorString", driver.get_error) && find(library, "cuLaunchKernel", driver.launch);
}

PyObject* enable_triton_launch(PyObject*, PyObject* given) {
  PyObject *capsule, *tensor, *parameter;
  if (!PyArg_ParseTuple(
          given, "OO!O!:enable_triton_launch", &capsule, &PyType_Type, &tensor, &PyType_Type, &parameter)) {
    return nullptr;
  }
  exchange = exchange_of(capsule);
  if (exchange == nullptr) return PyErr_Occurred() ? nullptr : PyBool_FromLong(false);
  Py_INCREF(tensor);
  Py_INCREF(parameter);
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor);
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter);
  return PyBool_FromLong(find_driver());
}

PyMethodDef methods[] = {
    fastkd::method(
        "enable_triton_launch", enable_triton_launch, METH_VARARGS,
        "Give launch_triton the capsule torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor and torch.nn.Parameter; "
        "False where torch or the CUDA driver lacks something."),
    fastkd::method(
        "new_triton_binaries", new_triton_binaries, METH_NOARGS,
        "What launch_triton looks binaries up in, one for every kernel."),
    fastkd::method(
        "remember_triton", remember_triton, METH_VARARGS,
        "Remember a binary; False where it cannot be launched this way, or is known."),
    fastkd::method(
        "launch_triton", launch_triton, METH_FASTCALL,
        "Launch the binary remembered for such arguments; False where there is none."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool bind_triton_launch(PyObject* module) {
  return PyModule_AddFunctions(module, methods) == 0;
}
