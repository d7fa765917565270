// Student heads on narrow activations, a block of sequences at a time; compiled once per instruction set by simd_levels.h.
#include "simd_vectors.h"

constexpr int kSequences = LANES == 16 ? 8 : 4;  // that share each load of a folded matrix

static_assert(kSequences <= kMostSequences, "the scratch is too small");

// out[s] = bias + vectors[s] matrix for COUNT vectors and N vectors of columns, all sums in registers.
template <int COUNT, int N>
static inline void multiply_columns(
    const float* vectors, int64_t vector_stride, const float* matrix, int64_t terms, int64_t width, const float* bias,
    float* out, int64_t out_stride) {
  Floats sums[COUNT][N];
  for (int s = 0; s < COUNT; ++s) {
    for (int n = 0; n < N; ++n) sums[s][n] = load(bias + n * LANES);
  }
  for (int64_t k = 0; k < terms; ++k) {
    Floats row[N];
    for (int n = 0; n < N; ++n) row[n] = load(matrix + k * width + n * LANES);
    for (int s = 0; s < COUNT; ++s) {
      const Floats factor = splat(vectors[s * vector_stride + k]);
      for (int n = 0; n < N; ++n) sums[s][n] += factor * row[n];
    }
  }
  for (int s = 0; s < COUNT; ++s) {
    for (int n = 0; n < N; ++n) store(out + s * out_stride + n * LANES, sums[s][n]);
  }
}

// The same for all `width` columns.
template <int COUNT>
static inline void multiply(
    const float* vectors, int64_t vector_stride, const float* matrix, int64_t terms, int64_t width, const float* bias,
    float* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + 2 * LANES <= width; i += 2 * LANES) {
    multiply_columns<COUNT, 2>(vectors, vector_stride, matrix + i, terms, width, bias + i, out + i, out_stride);
  }
  for (; i + LANES <= width; i += LANES) {
    multiply_columns<COUNT, 1>(vectors, vector_stride, matrix + i, terms, width, bias + i, out + i, out_stride);
  }
  for (; i < width; ++i) {
    for (int s = 0; s < COUNT; ++s) {
      float sum = bias[i];
      for (int64_t k = 0; k < terms; ++k) sum += vectors[s * vector_stride + k] * matrix[k * width + i];
      out[s * out_stride + i] = sum;
    }
  }
}

// The same for `count` vectors, 1 to kSequences.
static inline void multiply_all(
    int64_t count, const float* vectors, int64_t vector_stride, const float* matrix, int64_t terms, int64_t width,
    const float* bias, float* out, int64_t out_stride) {
  if (count == kSequences) {
    multiply<kSequences>(vectors, vector_stride, matrix, terms, width, bias, out, out_stride);
    return;
  }
  for (int64_t s = 0; s < count; ++s) {
    multiply<1>(
        vectors + s * vector_stride, vector_stride, matrix, terms, width, bias, out + s * out_stride, out_stride);
  }
}

template <typename T>
static inline float dot(const float* left, const T* right, int64_t size) {
  Floats sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= size; i += 2 * LANES) {
    sums[0] += load(left + i) * load(right + i);
    sums[1] += load(left + i + LANES) * load(right + i + LANES);
  }
  for (; i + LANES <= size; i += LANES) sums[0] += load(left + i) * load(right + i);
  float sum = sum_of(sums[0] + sums[1]);
  for (; i < size; ++i) sum += left[i] * widen(right[i]);
  return sum;
}

// Scores, in units of log2, become weights that sum to 1; there is room for a whole vector behind the last.
static inline void softmax(float* scores, int64_t tokens) {
  const int64_t padded = (tokens + LANES - 1) / LANES * LANES;
  for (int64_t t = tokens; t < padded; ++t) scores[t] = -__builtin_inff();
  Floats largest = load(scores);
  for (int64_t t = LANES; t < padded; t += LANES) largest = larger(load(scores + t), largest);
  const float maximum = largest_of(largest);
  Floats total{};
  for (int64_t t = 0; t < padded; t += LANES) {
    const Floats weights = power_of_two(load(scores + t) - maximum);
    store(scores + t, weights);
    total += weights;
  }
  const float normaliser = 1.f / sum_of(total);
  for (int64_t t = 0; t < padded; t += LANES) store(scores + t, load(scores + t) * normaliser);
}

// N vectors of columns of sum_t weights[t] rows[t].
template <int N, typename T>
static inline void average_columns(const float* weights, const T* const* rows, int64_t tokens, int64_t column, float* out) {
  Floats sums[N] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    const Floats weight = splat(weights[t]);
    for (int n = 0; n < N; ++n) sums[n] += weight * load(rows[t] + column + n * LANES);
  }
  for (int n = 0; n < N; ++n) store(out + column + n * LANES, sums[n]);
}

template <typename T>
static inline void average(const float* weights, const T* const* rows, int64_t tokens, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + 8 * LANES <= width; i += 8 * LANES) average_columns<8>(weights, rows, tokens, i, out);
  for (; i + LANES <= width; i += LANES) average_columns<1>(weights, rows, tokens, i, out);
  for (; i < width; ++i) {
    out[i] = 0.f;
    for (int64_t t = 0; t < tokens; ++t) out[i] += weights[t] * widen(rows[t][i]);
  }
}

static inline Floats tanh_of(Floats x) {
  const float minus_two_log2e = -2.885390082f;
  const Floats magnitude = x < 0.f ? -x : x;
  const Floats decay = power_of_two(magnitude * minus_two_log2e);
  const Floats result = (1.f - decay) / (1.f + decay);
  return x < 0.f ? -result : result;
}

static inline void tanh_row(float* row, int64_t width) {
  const int64_t whole = width - width % LANES;
  for (int64_t i = 0; i < whole; i += LANES) store(row + i, tanh_of(load(row + i)));
  float tail[LANES] = {};
  for (int64_t i = whole; i < width; ++i) tail[i - whole] = row[i];
  store(tail, tanh_of(load(tail)));
  for (int64_t i = whole; i < width; ++i) row[i] = tail[i - whole];
}

// The tokens of a sequence that may be attended to: the others are never read, so NaN in padding changes nothing.
template <typename T>
static inline int64_t find_rows(const Heads& call, int64_t sequence, const T** rows) {
  const int64_t first = call.first(sequence), length = call.length(sequence), stride = call.row_stride;
  const T* head = static_cast<const T*>(call.rows);
  const T* tail = static_cast<const T*>(call.tail);
  int64_t found = 0;
  for (int64_t token = 0; token < length; ++token) {
    if (call.mask && !call.mask[sequence * call.padded + token]) continue;
    const int64_t row = first + token;
    rows[found++] = row < call.head_rows ? head + row * stride : tail + (row - call.head_rows) * stride;
  }
  return found;
}

template <typename T>
static void attend(
    const Heads& call, const float* queries, const T* const* rows, int64_t tokens, float* scores, float* contexts) {
  const float log2e = 1.442695041f;
  for (int64_t head = 0; head < call.heads; ++head) {
    const float* query = queries + head * call.width;
    for (int64_t t = 0; t < tokens; ++t) scores[t] = dot(query, rows[t], call.width) * log2e;
    softmax(scores, tokens);
    average(scores, rows, tokens, call.width, contexts + head * call.width);
  }
}

template <typename T>
static void classify(const Heads& call, int64_t begin, int64_t end, float* scratch, const void** pointers) {
  const int64_t width = call.width, wide = call.heads * width;
  float* queries = scratch;                     // [kSequences, heads, D]
  float* contexts = queries + kSequences * wide;  // [kSequences, heads, D]
  float* vectors = contexts + kSequences * wide;  // [kSequences, D]: token 0, later the dense layer
  float* scores = vectors + kSequences * width;   // [longest sequence], in whole vectors
  const T** rows = reinterpret_cast<const T**>(pointers);
  for (int64_t first = begin; first < end; first += kSequences) {
    const int64_t count = end - first < kSequences ? end - first : kSequences;
    for (int64_t s = 0; s < count; ++s) {
      find_rows(call, first + s, rows);
      copy_rows(rows[0], width, 1, width, vectors + s * width);
    }
    for (int64_t head = 0; head < call.heads; ++head) {
      multiply_all(
          count, vectors, width, call.query_key + head * width * width, width, width, call.query_bias + head * width,
          queries + head * width, wide);
    }
    for (int64_t s = 0; s < count; ++s) {
      const int64_t tokens = find_rows(call, first + s, rows);
      attend(call, queries + s * wide, rows, tokens, scores, contexts + s * wide);
    }
    multiply_all(count, contexts, wide, call.mix, wide, width, call.mix_bias, vectors, width);
    for (int64_t s = 0; s < count; ++s) {
      tanh_row(vectors + s * width, width);
      for (int64_t label = 0; label < call.classes; ++label) {
        call.logits[(first + s) * call.classes + label] =
            call.classifier_bias[label] + dot(vectors + s * width, call.classifier + label * width, width);
      }
    }
  }
}

static const Kernels kKernels{classify<float>, classify<Bf16>};
