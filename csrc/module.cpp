// The Python module: what this build is made of. Ops reach Python through torch.ops; exit_gate has a shorter way too.
#include <pybind11/pybind11.h>

static_assert(PYBIND11_VERSION_HEX >= 0x03000000, "fastkd_kernels needs pybind11 >= 3.0");

void bind_exit_gate(pybind11::module_& module);
void bind_triton_launch(pybind11::module_& module);

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastkd_kernels; importing this registers them with torch.ops.";
  // raised together with INTERFACE in fastkd_kernels/_extension.py whenever a schema or a binding changes
  m.attr("interface") = 2;
  m.attr("built_with_torch") = FASTKD_BUILT_WITH_TORCH;
  m.attr("compiler") = __VERSION__;
  // both empty where the CUDA kernels were not built
  m.attr("cuda_architectures") = FASTKD_CUDA_ARCHITECTURES;
  m.attr("cuda_toolkit") = FASTKD_CUDA_TOOLKIT;
  bind_exit_gate(m);
  bind_triton_launch(m);
}
