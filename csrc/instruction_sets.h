// The instruction sets that CPU kernels are compiled for, and which of them runs on this machine: asked once, for every op.
// GCC >= 10 and clang >= 14 compile all of them, whatever the flags; on aarch64 the baseline is NEON.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <string_view>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#define FASTKD_X86_LEVELS 1
#define FASTKD_AVX2 "avx2,fma"
#if defined(__clang__)
#define FASTKD_AVX512 "avx512f,avx512dq,avx512vl,avx512bw,fma"
#else
// GCC would otherwise take half of a vector; clang takes the whole, and refuses every word here if it does not know one
#define FASTKD_AVX512 "avx512f,avx512dq,avx512vl,avx512bw,fma,prefer-vector-width=512"
#endif
#endif

// Between these two, functions are compiled for the named instruction set.
#define FASTKD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FASTKD_BEGIN_TARGET(names) \
  FASTKD_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define FASTKD_END_TARGET _Pragma("clang attribute pop")
#else
#define FASTKD_BEGIN_TARGET(names) _Pragma("GCC push_options") FASTKD_PRAGMA(GCC target(names))
#define FASTKD_END_TARGET _Pragma("GCC pop_options")
#endif

namespace fastkd {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// ATEN_CPU_CAPABILITY lowers it exactly as it does for PyTorch itself.
inline InstructionSet find_instruction_set() {
#if FASTKD_X86_LEVELS
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view asked = variable ? variable : "";
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (asked == "default" || !has_avx2) return InstructionSet::kBaseline;
  return has_avx512 && asked != "avx2" ? InstructionSet::kAvx512 : InstructionSet::kAvx2;
#else
  return InstructionSet::kBaseline;
#endif
}

inline const char* name_of(InstructionSet set) {
  if (set == InstructionSet::kAvx512) return "AVX-512";
  if (set == InstructionSet::kAvx2) return "AVX2";
#if defined(__x86_64__)
  return "SSE2";
#elif defined(__aarch64__)
  return "NEON";
#else
  return "baseline";
#endif
}

// What each op chose, for fastkd_kernels.info.
inline std::vector<std::pair<const char*, const char*>>& chosen_instruction_sets() {
  static std::vector<std::pair<const char*, const char*>> chosen;
  return chosen;
}

// Called while the library is loaded, once by every file of kernels.
inline InstructionSet choose_instruction_set(std::initializer_list<const char*> ops) {
  static const InstructionSet set = find_instruction_set();
  for (const char* op : ops) chosen_instruction_sets().emplace_back(op, name_of(set));
  return set;
}

}  // namespace fastkd
