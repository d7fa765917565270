// The Python module: what this build is made of. Ops reach Python through torch.ops, never through pybind11.
#include <pybind11/pybind11.h>

static_assert(PYBIND11_VERSION_HEX >= 0x03000000, "fastkd needs pybind11 >= 3.0 ahead of the headers of torch");

void bind_exit_gate(pybind11::module_& module);

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastkd_kernels; importing this registers them with torch.ops.";
  m.attr("cuda_architectures") = FASTKD_CUDA_ARCHITECTURES;
  m.attr("built_with_torch") = FASTKD_BUILT_WITH_TORCH;
  m.attr("compiler") = __VERSION__;
  bind_exit_gate(m);
}
