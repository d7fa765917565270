// The kernels of an encoder layer for one instruction set: included by encoder_layer_<level>.cpp, which defines LEVEL,
// TARGETS, LANES and what the level has beyond vectors of that many floats (HAS_VNNI, HAS_BF16, HAS_AMX).
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

#if defined(__x86_64__) || !defined(TARGETS)

#if defined(__x86_64__) && !defined(FASTKD_X86_LEVELS)
#define FASTKD_X86_LEVELS 1
#endif

#define FASTKD_TEXT(...) #__VA_ARGS__
#define FASTKD_PRAGMA_OF(...) _Pragma(FASTKD_TEXT(__VA_ARGS__))
#ifdef TARGETS
#if defined(__clang__)
FASTKD_PRAGMA_OF(clang attribute push(__attribute__((target(TARGETS))), apply_to = function))
#else
#pragma GCC push_options
FASTKD_PRAGMA_OF(GCC target(TARGETS))
#endif
#endif

namespace fastkd::encoder_layer::LEVEL {
namespace {
#include "encoder_layer_simd.h"
}
}  // namespace fastkd::encoder_layer::LEVEL

#ifdef TARGETS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#define FASTKD_KERNELS_OF(level) FASTKD_JOINED(level, _kernels)
#define FASTKD_JOINED(level, name) level##name
const fastkd::encoder_layer::Kernels* fastkd::encoder_layer::FASTKD_KERNELS_OF(LEVEL)() {
  return &LEVEL::kKernels;
}

#else

#define FASTKD_KERNELS_OF(level) FASTKD_JOINED(level, _kernels)
#define FASTKD_JOINED(level, name) level##name
const fastkd::encoder_layer::Kernels* fastkd::encoder_layer::FASTKD_KERNELS_OF(LEVEL)() {
  return nullptr;
}

#endif
