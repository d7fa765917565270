// What code for several instruction sets (simd_levels.h) needs outside every namespace.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string_view>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastkd {

struct Bf16 {
  uint16_t bits;
};

}  // namespace fastkd
