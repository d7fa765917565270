// The Python module: what this build is made of. Ops reach Python through torch.ops; some have a shorter way too.
#include "python_api.h"

#include "instruction_sets.h"

bool bind_exit_gate(PyObject* module);
bool bind_module_stamp(PyObject* module);
bool bind_packed_stage(PyObject* module);
bool bind_pack_tokens(PyObject* module);
bool bind_triton_launch(PyObject* module);

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;  // begins with its name
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

bool add_instruction_sets(PyObject* module) {
  const fastkd::Owned chosen(PyDict_New());
  if (!chosen) return false;
  for (const auto& [op, name] : fastkd::chosen_instruction_sets()) {
    const fastkd::Owned text(PyUnicode_FromString(name));
    if (!text || PyDict_SetItemString(chosen.get(), op, text.get()) != 0) return false;
  }
  return PyObject_SetAttrString(module, "instruction_sets", chosen.get()) == 0;
}

bool describe(PyObject* module) {
  return PyModule_AddIntConstant(module, "interface", fastkd::kInterface) == 0 &&
      PyModule_AddStringConstant(module, "built_with_torch", FASTKD_BUILT_WITH_TORCH) == 0 &&
      PyModule_AddStringConstant(module, "compiler", kCompiler) == 0 &&
      // of the library beside this one, csrc/module_cuda.cpp; both empty where it was not built
      PyModule_AddStringConstant(module, "cuda_architectures", FASTKD_CUDA_ARCHITECTURES) == 0 &&
      PyModule_AddStringConstant(module, "cuda_toolkit", FASTKD_CUDA_TOOLKIT) == 0 && add_instruction_sets(module);
}

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", "Compiled kernels of fastkd_kernels; importing this registers them with torch.ops.",
    -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  fastkd::Owned module(PyModule_Create(&definition));
  if (!module || !describe(module.get()) || !bind_exit_gate(module.get()) || !bind_module_stamp(module.get()) ||
      !bind_packed_stage(module.get()) || !bind_pack_tokens(module.get()) || !bind_triton_launch(module.get())) {
    return nullptr;
  }
  return module.release();
}
