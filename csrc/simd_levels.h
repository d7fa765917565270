// Compiles FASTKD_SIMD_SOURCE once per instruction set, each time in a namespace and under a target pragma of its own with
// LANES defined, and picks one of the results when the library is loaded. The source must define `kKernels` of type
// Kernels, and may not instantiate standard templates: the linker could hand such an instance to code of another level.
// Included inside a namespace, after simd.h.

namespace baseline {
#define LANES 4
#include FASTKD_SIMD_SOURCE
#undef LANES
}  // namespace baseline

#if FASTKD_X86_LEVELS
FASTKD_BEGIN_TARGET(FASTKD_AVX2)
namespace avx2 {
#define LANES 8
#include FASTKD_SIMD_SOURCE
#undef LANES
}  // namespace avx2
FASTKD_END_TARGET

FASTKD_BEGIN_TARGET(FASTKD_AVX512)
namespace avx512 {
#define LANES 16
#include FASTKD_SIMD_SOURCE
#undef LANES
}  // namespace avx512
FASTKD_END_TARGET
#endif

inline Kernels choose_kernels(std::initializer_list<const char*> ops) {
  switch (fastkd::choose_instruction_set(ops)) {
#if FASTKD_X86_LEVELS
    case fastkd::InstructionSet::kAvx512: return avx512::kKernels;
    case fastkd::InstructionSet::kAvx2: return avx2::kKernels;
#endif
    default: return baseline::kKernels;
  }
}
