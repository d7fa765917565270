// The Python module of the CUDA kernels, a library of its own: where it cannot be loaded, those of the CPU still are.
#include "python_api.h"

namespace {

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of fastkd_kernels; importing this registers them with torch.ops.",
    -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() {
  fastkd::Owned module(PyModule_Create(&definition));
  if (!module || PyModule_AddIntConstant(module.get(), "interface", fastkd::kInterface) != 0) return nullptr;
  return module.release();
}
