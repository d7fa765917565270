// Row arithmetic that the CPU kernels of the distillation losses share; compiled once per instruction set by simd_levels.h. A
// row holds the C logits of one sample; -inf is a masked class. Formulas: fastkd_kernels/_distillation.py.
//
// Everything is written for a value type V. With V = float or double a row is an array of numbers and loops over it
// become vector instructions. A handful of classes is too short for that: with V = Pack every element of the row holds
// that class of 16 samples, and every operation is a vector operation whatever the number of classes.

template <typename V>
FASTKD_INLINE V splat(Scalar<V> value) {
  if constexpr (kPacked<V>) return Pack{} + value;
  else return value;
}

template <typename V>
FASTKD_INLINE V minus_infinity() { return splat<V>(-__builtin_inff()); }

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
  __builtin_memcpy(&power, &bits, sizeof(power));
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
FASTKD_OUTLINED V sum(const V* values, int64_t size) {
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
FASTKD_OUTLINED V dot(const V* left, const V* right, int64_t size) {
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
FASTKD_OUTLINED V maximum(const V* values, int64_t size) {
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
FASTKD_OUTLINED void add_scaled(V* target, V scale, const V* source, int64_t size) {
#pragma omp simd
  for (int64_t c = 0; c < size; ++c) target[c] += scale * source[c];
}

template <typename V>
FASTKD_INLINE void write_losses(V value, Samples samples, Scalar<V>* losses) {
  const auto* lanes = reinterpret_cast<const Scalar<V>*>(&value);
  for (int64_t lane = 0; lane < samples.count; ++lane) losses[samples.first + lane] = lanes[lane];
}

// out = log softmax(scale * x), and exp(out) into probs; out may be x.
template <typename V>
FASTKD_OUTLINED void log_softmax(const V* x, Scalar<V> scale, int64_t size, V* out, V* probs) {
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
FASTKD_OUTLINED void distribution(
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
FASTKD_OUTLINED V softmax_gradient(const V* terms, const V* probs, int64_t size, V* gradient) {
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
FASTKD_OUTLINED V divergence_of(
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
