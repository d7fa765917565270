// What code for several instruction sets (simd_levels.h) needs outside every namespace.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "instruction_sets.h"

namespace fastkd {

struct Bf16 {
  uint16_t bits;
};

}  // namespace fastkd
