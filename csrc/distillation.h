// Row arithmetic that the CPU kernels of the distillation losses share. A row holds the C logits of one sample; -inf is
// a masked class. Formulas: fastkd_kernels/_distillation.py and fastkd_kernels/ops/universal_kd_loss.py.
//
// Everything is written for a value type V. With V = float or double a row is an array of numbers and loops over it
// become vector instructions. A handful of classes is too short for that: with V = Pack every element of the row holds
// that class of 16 samples, and every operation is a vector operation whatever the number of classes.
#pragma once

#include "instruction_sets.h"
#include "stable_compat.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define FASTKD_INLINE inline __attribute__((always_inline))

namespace fastkd::distillation {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The codes of the schema, in the order of the tuples in fastkd_kernels/_distillation.py.
enum DivergenceKind : int64_t { kForward, kReverse, kJsd, kSquared };
enum Mix : int64_t { kMixLogits, kMixProbs, kMixLoss };
enum Space : int64_t { kLogits, kLogProbs, kProbs };

struct Divergence {
  DivergenceKind kind;
  double beta;  // the teacher's share of the mixture in kJsd, between 0 and 1
};

constexpr int kPackLanes = 16;
typedef float Pack __attribute__((vector_size(4 * kPackLanes)));
typedef int32_t PackedInt __attribute__((vector_size(4 * kPackLanes)));

template <typename V>
constexpr bool kPacked = std::is_same_v<V, Pack>;
template <typename V>
constexpr int kLanes = kPacked<V> ? kPackLanes : 1;
template <typename V>
using Scalar = std::conditional_t<kPacked<V>, float, V>;

// An array of V that no thread shares; copies are as long, and as uninitialised.
template <typename V>
class Scratch {
 public:
  explicit Scratch(int64_t size) : size_(size), values_(static_cast<V*>(::operator new(size * sizeof(V), kAlignment))) {}
  Scratch(const Scratch& other) : Scratch(other.size_) {}
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(values_, kAlignment); }
  V* data() { return values_; }

 private:
  // what AVX-512 expects of a Pack; alignof(Pack) is that of the instruction set of the caller
  static constexpr std::align_val_t kAlignment{64};
  int64_t size_;
  V* values_;
};

template <typename V>
FASTKD_INLINE V splat(Scalar<V> value) {
  if constexpr (kPacked<V>) return Pack{} + value;
  else return value;
}

template <typename V>
FASTKD_INLINE V minus_infinity() { return splat<V>(-std::numeric_limits<Scalar<V>>::infinity()); }

template <typename V>
FASTKD_INLINE V larger(V one, V other) { return one > other ? one : other; }

template <typename V>
FASTKD_INLINE V smaller(V one, V other) { return one < other ? one : other; }

template <typename V, Scalar<V> (*function)(Scalar<V>)>
FASTKD_INLINE V each_lane(V x) {
  if constexpr (kPacked<V>) {
    for (int lane = 0; lane < kPackLanes; ++lane) x[lane] = function(x[lane]);
    return x;
  } else {
    return function(x);
  }
}

template <typename V>
FASTKD_INLINE V logarithm(V x) { return each_lane<V, std::log>(x); }

template <typename V>
FASTKD_INLINE V logarithm_of_1_plus(V x) { return each_lane<V, std::log1p>(x); }

FASTKD_INLINE float power_of_two(float n) {
  const int32_t bits = (static_cast<int32_t>(n) + 127) * (1 << 23);
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
}

FASTKD_INLINE Pack power_of_two(Pack n) { return (Pack)((__builtin_convertvector(n, PackedInt) + 127) << 23); }

// exp, in single precision to one unit in the last place and without a branch: 2^n times a polynomial in the remainder
// (Cody and Waite). Below the smallest normal number the result is 0.
template <typename V>
FASTKD_INLINE V exponential(V x) {
  if constexpr (std::is_same_v<V, double>) {
    return std::exp(x);
  } else {
    const V low = splat<V>(-87.0f), high = splat<V>(88.0f), zero = splat<V>(0.0f);
    const V round = splat<V>(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
    const V bounded = x > high ? high : (x < low ? low : x);
    const V n = (bounded * 1.44269504f + round) - round;
    const V r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
    V poly = r * 1.9875691500e-4f + 1.3981999507e-3f;
    poly = poly * r + 8.3334519073e-3f;
    poly = poly * r + 4.1665795894e-2f;
    poly = poly * r + 1.6666665459e-1f;
    poly = poly * r + 5.0000001201e-1f;
    const V mantissa = (poly * r * r + r) + 1.0f;
    // NaN leaves through the mantissa; converting it to an integer is undefined
    const V power = power_of_two(n == n ? n : zero);
    return x < low ? zero : mantissa * power;
  }
}

template <typename V>
FASTKD_INLINE V sum(const V* values, int64_t size) {
  V total = splat<V>(0);
  if constexpr (kPacked<V>) {
    for (int64_t c = 0; c < size; ++c) total += values[c];
  } else {
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < size; ++c) total += values[c];
  }
  return total;
}

template <typename V>
FASTKD_INLINE V dot(const V* left, const V* right, int64_t size) {
  V total = splat<V>(0);
  if constexpr (kPacked<V>) {
    for (int64_t c = 0; c < size; ++c) total += left[c] * right[c];
  } else {
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < size; ++c) total += left[c] * right[c];
  }
  return total;
}

template <typename V>
FASTKD_INLINE V maximum(const V* values, int64_t size) {
  V top = minus_infinity<V>();
  if constexpr (kPacked<V>) {
    for (int64_t c = 0; c < size; ++c) top = larger(values[c], top);
  } else {
#pragma omp simd reduction(max : top)
    for (int64_t c = 0; c < size; ++c) top = values[c] > top ? values[c] : top;
  }
  return top;
}

template <typename V>
FASTKD_INLINE void fill(V* target, int64_t size, Scalar<V> value) {
  for (int64_t c = 0; c < size; ++c) target[c] = splat<V>(value);
}

template <typename V>
FASTKD_INLINE void add_scaled(V* target, V scale, const V* source, int64_t size) {
#pragma omp simd
  for (int64_t c = 0; c < size; ++c) target[c] += scale * source[c];
}

// `count` neighbouring samples, as many as V has lanes or fewer.
struct Samples {
  int64_t first, count;
};

// A matrix of logits: one row for every sample of one layer.
struct Rows {
  const void* data;
  ScalarType type;
  int64_t row_stride;
  int64_t column_stride;

  Rows(const Tensor& tensor, int64_t row_dimension, int64_t offset = 0)
      : data(static_cast<const char*>(tensor.const_data_ptr()) + offset * static_cast<int64_t>(tensor.element_size())),
        type(tensor.scalar_type()),
        row_stride(tensor.stride(row_dimension)),
        column_stride(tensor.stride(row_dimension + 1)) {}
};

// Not inlined, as they are long and move memory only.
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

// A contiguous gradient in the dtype of its input; no data where it is not wanted.
struct Gradient {
  void* data = nullptr;
  ScalarType type = ScalarType::Float;

  Gradient() = default;
  explicit Gradient(const Tensor& tensor)
      : data(tensor.numel() ? tensor.mutable_data_ptr() : nullptr), type(tensor.scalar_type()) {}
};

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

template <typename V>
FASTKD_INLINE void write_losses(V value, Samples samples, Scalar<V>* losses) {
  const auto* lanes = reinterpret_cast<const Scalar<V>*>(&value);
  for (int64_t lane = 0; lane < samples.count; ++lane) losses[samples.first + lane] = lanes[lane];
}

// out = log softmax(scale * x), and exp(out) into probs; out may be x.
template <typename V>
FASTKD_INLINE void log_softmax(const V* x, Scalar<V> scale, int64_t size, V* out, V* probs) {
  V top = maximum(x, size);
  top = top == minus_infinity<V>() ? splat<V>(0) : top;
#pragma omp simd
  for (int64_t c = 0; c < size; ++c) {
    out[c] = scale * (x[c] - top);
    probs[c] = exponential(out[c]);
  }
  const V total = sum(probs, size);
  const V log_total = logarithm(total), inverse = splat<V>(1) / total;
#pragma omp simd
  for (int64_t c = 0; c < size; ++c) {
    out[c] -= log_total;
    probs[c] *= inverse;
  }
}

// One distribution: log-probabilities and probabilities; for kSquared both are the scaled logits.
template <typename V>
struct Distribution {
  V* log_probs;
  V* probs;
};

template <typename V>
FASTKD_INLINE void distribution(
    const V* logits, Scalar<V> inverse_temperature, int64_t size, Divergence divergence, const Distribution<V>& out) {
  if (divergence.kind != kSquared) return log_softmax(logits, inverse_temperature, size, out.log_probs, out.probs);
  for (int64_t c = 0; c < size; ++c) out.probs[c] = out.log_probs[c] = inverse_temperature * logits[c];
}

// prob * (log_prob - other), where a probability of 0 contributes 0 whatever its logarithm.
template <typename V>
FASTKD_INLINE V expected_log_ratio(V prob, V log_prob, V other) {
  const V zero = splat<V>(0);
  return prob == zero ? zero : prob * (log_prob - other);
}

// Turns dD/dp * p into the gradient with respect to the tempered logits of p, and returns the sum it took away.
template <typename V>
FASTKD_INLINE V softmax_gradient(const V* terms, const V* probs, int64_t size, V* gradient) {
  const V total = sum(terms, size);
#pragma omp simd
  for (int64_t c = 0; c < size; ++c) gradient[c] = terms[c] - probs[c] * total;
  return total;
}

// log(exp(log_p) + exp(log_q))
template <typename V>
FASTKD_INLINE V log_sum(V log_p, V log_q) {
  const V high = larger(log_p, log_q), low = smaller(log_p, log_q);
  const V none = splat<V>(0);
  const V gap = low == minus_infinity<V>() ? minus_infinity<V>() : low - high;
  return high + (gap == minus_infinity<V>() ? none : logarithm_of_1_plus(exponential(gap)));
}

// D(p, q) and its gradients with respect to the tempered logits. p_terms is dD/dp * p, which mixing probabilities
// needs.
template <typename V>
FASTKD_INLINE V divergence_of(
    const Distribution<V>& p, const Distribution<V>& q, int64_t size, Divergence divergence, V* p_gradient,
    V* q_gradient, V* p_terms) {
  switch (divergence.kind) {
    case kForward: {
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) {
        p_terms[c] = expected_log_ratio(p.probs[c], p.log_probs[c], q.log_probs[c]);
        q_gradient[c] = q.probs[c] - p.probs[c];
      }
      return softmax_gradient(p_terms, p.probs, size, p_gradient);
    }
    case kReverse: {
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) {
        q_gradient[c] = expected_log_ratio(q.probs[c], q.log_probs[c], p.log_probs[c]);
        p_gradient[c] = p.probs[c] - q.probs[c];
        p_terms[c] = -q.probs[c];
      }
      return softmax_gradient(q_gradient, q.probs, size, q_gradient);
    }
    case kJsd: {
      const V p_share = splat<V>(static_cast<Scalar<V>>(divergence.beta));
      const V q_share = splat<V>(static_cast<Scalar<V>>(1 - divergence.beta));
      const V log_p_share = splat<V>(static_cast<Scalar<V>>(std::log(divergence.beta)));
      const V log_q_share = splat<V>(static_cast<Scalar<V>>(std::log1p(-divergence.beta)));
      for (int64_t c = 0; c < size; ++c) {
        const V mixture = log_sum(p.log_probs[c] + log_p_share, q.log_probs[c] + log_q_share);
        p_terms[c] = p_share * expected_log_ratio(p.probs[c], p.log_probs[c], mixture);
        q_gradient[c] = q_share * expected_log_ratio(q.probs[c], q.log_probs[c], mixture);
      }
      const V p_total = softmax_gradient(p_terms, p.probs, size, p_gradient);
      return p_total + softmax_gradient(q_gradient, q.probs, size, q_gradient);
    }
    default: {
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) {
        const V difference = p.probs[c] - q.probs[c];
        p_terms[c] = difference * difference;
        p_gradient[c] = difference + difference;
        q_gradient[c] = -p_gradient[c];
      }
      return sum(p_terms, size);
    }
  }
}

inline ScalarType accumulate_type(const Tensor& one, const Tensor& other) {
  const bool wide = one.scalar_type() == ScalarType::Double || other.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

// A contiguous tensor of the shape of `input`, or an empty one where no gradient is wanted. That of float16 waits in
// float32 for the backward pass, whose scale may lift what would underflow.
inline Tensor gradient_like(const Tensor& input, bool wanted) {
  const ScalarType type = input.scalar_type() == ScalarType::Half ? ScalarType::Float : input.scalar_type();
  if (!wanted) return torch::stable::new_empty(input, {0}, type);
  const std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  return torch::stable::new_empty(input, shape, type);
}

inline void check_floating(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      tensor.is_cpu() && (type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                          type == ScalarType::Half),
      name, ": expected float32, float64, bfloat16 or float16 on CPU");
}

// Whether scratch of `values` a sample still fits into a core's own cache for 16 samples at once.
inline bool worth_packing(int64_t values, ScalarType accumulate) {
  constexpr int64_t kCacheBytes = 512 * 1024;
  return accumulate == ScalarType::Float && values * static_cast<int64_t>(sizeof(Pack)) <= kCacheBytes;
}

// Shares the samples of a batch out between the threads as body(Samples, workspace), `lanes` samples at a time. A
// thread gets no less than some 8192 logits of `work` a sample: below that, waking it takes longer than the work.
template <typename workspace_t, typename body_t>
void parallel_samples(int64_t batch, int lanes, int64_t work, const workspace_t& workspace, const body_t& body) {
  const int64_t groups = (batch + lanes - 1) / lanes;
  const int64_t useful = std::clamp<int64_t>(batch * work / 8192, 1, std::max<int64_t>(groups, 1));
  const int64_t workers = useful == 1 ? 1 : std::min<int64_t>(useful, torch::stable::get_num_threads());
  // allocated here, because nothing may throw inside parallel_for
  std::vector<workspace_t> workspaces(workers, workspace);
  const auto work_for = [&](int64_t worker) {
    const int64_t first = worker * groups / workers * lanes;
    const int64_t last = std::min((worker + 1) * groups / workers * lanes, batch);
    if (first < last) body(Samples{first, last - first}, workspaces[worker]);
  };
  if (workers == 1) return work_for(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work_for(worker);
  });
}

// factor * sum(losses) as a scalar, in an order that the number of threads does not change.
template <typename scalar_t>
Tensor reduced(const Tensor& losses, double factor) {
  double total = 0;
  const auto* values = static_cast<const scalar_t*>(losses.const_data_ptr());
  for (int64_t row = 0; row < losses.numel(); ++row) total += values[row];
  const Tensor loss = torch::stable::new_empty(losses, {});
  *static_cast<scalar_t*>(loss.mutable_data_ptr()) = static_cast<scalar_t>(factor * total);
  return loss;
}

// Defines `name`, which calls `name##_inline` compiled for the instruction set that `instruction_set` names.
#if FASTKD_X86_LEVELS
#define FASTKD_DISPATCH(name, parameters, arguments)                                                             \
  template <typename V>                                                                                          \
  __attribute__((target(FASTKD_AVX2))) void name##_avx2 parameters { name##_inline<V> arguments; }               \
  template <typename V>                                                                                          \
  __attribute__((target(FASTKD_AVX512))) void name##_avx512 parameters { name##_inline<V> arguments; }           \
  template <typename V>                                                                                          \
  void name parameters {                                                                                         \
    switch (instruction_set) {                                                                                   \
      case InstructionSet::kAvx512: return name##_avx512<V> arguments;                                           \
      case InstructionSet::kAvx2: return name##_avx2<V> arguments;                                               \
      default: return name##_inline<V> arguments;                                                                \
    }                                                                                                            \
  }
#else
#define FASTKD_DISPATCH(name, parameters, arguments) \
  template <typename V>                              \
  void name parameters { name##_inline<V> arguments; }
#endif

}  // namespace fastkd::distillation
