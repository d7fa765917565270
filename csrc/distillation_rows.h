// The row kernels of the distillation losses for one type of values: included by distillation_rows_<type>.cpp. Nothing takes
// longer to compile, so each type has a file of its own, and what several losses compute is compiled once for all of them.
#pragma once

#include "distillation.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "simd.h"

#define FASTKD_INLINE inline __attribute__((always_inline))
// compiled once for all that call it
#define FASTKD_OUTLINED static __attribute__((noinline))

namespace fastkd::distillation {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kPackLanes = 16;
typedef float Pack __attribute__((vector_size(4 * kPackLanes)));
typedef int32_t PackedInt __attribute__((vector_size(4 * kPackLanes)));

template <typename V>
constexpr bool kPacked = std::is_same_v<V, Pack>;
template <typename V>
constexpr int kLanes = kPacked<V> ? kPackLanes : 1;
template <typename V>
using Scalar = std::conditional_t<kPacked<V>, float, V>;

// Reading and writing move memory only, which no instruction set does faster.
template <typename scalar_t, typename V>
void widen_as(const Rows& rows, Samples samples, int64_t size, V* out) {
  auto* lanes = reinterpret_cast<Scalar<V>*>(out);
  for (int lane = 0; lane < kLanes<V>; ++lane) {
    // lanes without a sample repeat the last one: finite work that is never read
    const int64_t row = samples.first + std::min<int64_t>(lane, samples.count - 1);
    const auto* source = static_cast<const scalar_t*>(rows.data) + row * rows.row_stride;
    const int64_t stride = rows.column_stride;
    if (stride == 1) {
      for (int64_t c = 0; c < size; ++c) lanes[c * kLanes<V> + lane] = static_cast<Scalar<V>>(source[c]);
    } else {
      for (int64_t c = 0; c < size; ++c) lanes[c * kLanes<V> + lane] = static_cast<Scalar<V>>(source[c * stride]);
    }
  }
}

template <typename V>
void widen(const Rows& rows, Samples samples, int64_t size, V* out) {
  switch (rows.type) {
    case ScalarType::Double: return widen_as<double>(rows, samples, size, out);
    case ScalarType::BFloat16: return widen_as<BFloat16>(rows, samples, size, out);
    case ScalarType::Half: return widen_as<Half>(rows, samples, size, out);
    default: return widen_as<float>(rows, samples, size, out);
  }
}

template <typename scalar_t, typename V>
void narrow_as(const V* source, Samples samples, int64_t size, void* target, int64_t first_row) {
  const auto* lanes = reinterpret_cast<const Scalar<V>*>(source);
  for (int64_t lane = 0; lane < samples.count; ++lane) {
    auto* out = static_cast<scalar_t*>(target) + (first_row + samples.first + lane) * size;
    for (int64_t c = 0; c < size; ++c) out[c] = static_cast<scalar_t>(lanes[c * kLanes<V> + lane]);
  }
}

// Writes the rows of these samples; sample 0 is row `first_row` of the gradient.
template <typename V>
void narrow(const V* source, Samples samples, int64_t size, const Gradient& target, int64_t first_row = 0) {
  switch (target.type) {
    case ScalarType::Double: return narrow_as<double>(source, samples, size, target.data, first_row);
    case ScalarType::BFloat16: return narrow_as<BFloat16>(source, samples, size, target.data, first_row);
    case ScalarType::Half: return narrow_as<Half>(source, samples, size, target.data, first_row);
    default: return narrow_as<float>(source, samples, size, target.data, first_row);
  }
}

using Value = FASTKD_VALUE;
using Kernels = RowKernels;

#define FASTKD_SIMD_SOURCE "distillation_rows_simd.h"
#include "simd_levels.h"
#undef FASTKD_SIMD_SOURCE

const Kernels kernels = choose_kernels({"kd_loss", "fused_linear_kd_loss", "universal_kd_loss", "distillation_loss"});

}  // namespace
}  // namespace fastkd::distillation
