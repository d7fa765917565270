// Compiles FASTKD_SIMD_SOURCE once per instruction set, each time in a namespace and under a target pragma of its own with
// LANES defined, and picks one of the results when the library is loaded. The source must define `kKernels` of type
// Kernels, and may not instantiate standard templates: the linker could hand such an instance to code of another level.
// Included inside a namespace, after simd.h.

namespace baseline {
#define LANES 4
#include FASTKD_SIMD_SOURCE
#undef LANES
}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTKD_X86_LEVELS 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LANES 8
#include FASTKD_SIMD_SOURCE
#undef LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma,prefer-vector-width=512")
namespace avx512 {
#define LANES 16
#include FASTKD_SIMD_SOURCE
#undef LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

// ATEN_CPU_CAPABILITY lowers the level exactly as it does for PyTorch itself.
inline Kernels choose_kernels() {
#if FASTKD_X86_LEVELS
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view asked = variable ? variable : "avx512";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (asked == "avx512" && has_avx512) return avx512::kKernels;
  if (asked != "default" && has_avx2) return avx2::kKernels;
#endif
  return baseline::kKernels;
}
