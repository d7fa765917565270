// The kernels of an encoder layer for one instruction set: included by encoder_layer_<level>.cpp, which defines LEVEL,
// its NAME, LANES, TARGETS but for the baseline, and what it has beyond vectors of that many floats (HAS_VNNI, HAS_BF16,
// HAS_AMX).
#include "encoder_layer.h"

#ifndef HAS_VNNI
#define HAS_VNNI 0
#endif
#ifndef HAS_BF16
#define HAS_BF16 0
#endif
#ifndef HAS_AMX
#define HAS_AMX 0
#endif

#if FASTKD_X86_LEVELS || !defined(TARGETS)
#ifdef TARGETS
FASTKD_BEGIN_TARGET(TARGETS)
#endif
namespace fastkd::encoder_layer::LEVEL {
namespace {
#include "encoder_layer_simd.h"
}
}  // namespace fastkd::encoder_layer::LEVEL
#ifdef TARGETS
FASTKD_END_TARGET
#endif
#define FASTKD_KERNELS &LEVEL::kKernels
#else
#define FASTKD_KERNELS nullptr
#endif

#define FASTKD_JOINED(level, name) level##name
#define FASTKD_KERNELS_OF(level) FASTKD_JOINED(level, _kernels)
const fastkd::encoder_layer::Kernels* fastkd::encoder_layer::FASTKD_KERNELS_OF(LEVEL)() {
  return FASTKD_KERNELS;
}
