// Attention of one head of one sequence; compiled once per instruction set by simd_levels.h.
#include "simd_vectors.h"

// c[q][n] = sum_k a[q][k] b[k][n] for kQueries rows of a and N vectors of columns, all accumulators in registers.
template <int N>
static inline void multiply(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t terms, float* c, int64_t c_stride) {
  Floats sums[kQueries][N] = {};
  for (int64_t k = 0; k < terms; ++k) {
    Floats row[N];
    for (int n = 0; n < N; ++n) row[n] = load(b + k * b_stride + n * LANES);
    for (int q = 0; q < kQueries; ++q) {
      const Floats scale = splat(a[q * a_stride + k]);
      for (int n = 0; n < N; ++n) sums[q][n] += scale * row[n];
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int n = 0; n < N; ++n) store(c + q * c_stride + n * LANES, sums[q][n]);
  }
}

// The same for any multiple of LANES columns.
static void multiply_all(
    const float* a,
    int64_t a_stride,
    const float* b,
    int64_t b_stride,
    int64_t terms,
    float* c,
    int64_t c_stride,
    int64_t columns) {
  constexpr int kWide = LANES == 16 ? 4 : 2;  // as many as the registers hold
  int64_t n = 0;
  for (; n + kWide * LANES <= columns; n += kWide * LANES) {
    multiply<kWide>(a, a_stride, b + n, b_stride, terms, c + n, c_stride);
  }
  if (n + 2 * LANES <= columns) {
    multiply<2>(a, a_stride, b + n, b_stride, terms, c + n, c_stride);
    n += 2 * LANES;
  }
  if (n < columns) multiply<1>(a, a_stride, b + n, b_stride, terms, c + n, c_stride);
}

// The scores of kQueries rows, in units of log2, become unnormalised weights; normalisers are 1 / their sums.
static inline void softmax(float* scores, int64_t tokens, int64_t padded, float* normalisers) {
  Ints lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  const Ints beyond = lane >= static_cast<int32_t>(tokens - (padded - LANES));
  float maxima[kQueries];
  for (int q = 0; q < kQueries; ++q) {
    float* row = scores + q * padded;
    Floats largest = load(row + padded - LANES);
    largest = beyond ? splat(-__builtin_inff()) : largest;
    store(row + padded - LANES, largest);
    for (int64_t t = 0; t < padded - LANES; t += LANES) {
      largest = larger(load(row + t), largest);
    }
    maxima[q] = largest_of(largest);
  }
  Floats totals[kQueries] = {};
  for (int64_t t = 0; t < padded; t += LANES) {
    for (int q = 0; q < kQueries; ++q) {
      float* row = scores + q * padded + t;
      const Floats weights = power_of_two(larger(splat(-127.f), load(row) - maxima[q]));
      store(row, weights);
      totals[q] += weights;
    }
  }
  for (int q = 0; q < kQueries; ++q) normalisers[q] = 1.f / sum_of(totals[q]);
}

// keys[d, t] of the rows key[t, d]; whole blocks of LANES tokens, the last of them repeating the last token.
template <typename T>
static void transpose_keys(const T* key, int64_t stride, int64_t tokens, int64_t width, float* keys, int64_t padded) {
  for (int64_t t = 0; t < padded; t += LANES) {
    for (int64_t d = 0; d < width; d += LANES) {
      Floats block[LANES];
      for (int row = 0; row < LANES; ++row) {
        const T* from = key + (t + row < tokens ? t + row : tokens - 1) * stride + d;
        if (d + LANES <= width) {
          block[row] = load(from);
          continue;
        }
        float tail[LANES];
        widen_row(from, width - d, 1.f, tail);
        block[row] = load(tail);
      }
      transpose(block);
      const int64_t columns = width - d < LANES ? width - d : LANES;
      for (int64_t column = 0; column < columns; ++column) store(keys + (d + column) * padded + t, block[column]);
    }
  }
}

template <typename T>
static void attend(const Attention& call, int64_t first, int64_t tokens, int64_t head, float* scratch) {
  const int64_t width = call.head_size, wide = round_up(width, LANES), padded = round_up(tokens, LANES);
  float* keys = scratch;                        // [width, padded], transposed
  float* values = keys + width * padded;        // [tokens, wide]
  float* queries = values + tokens * wide;      // [kQueries, wide]
  float* scores = queries + kQueries * wide;    // [kQueries, padded]
  float* context = scores + kQueries * padded;  // [kQueries, wide]
  const T* query = static_cast<const T*>(call.query) + first * call.query_stride + head * width;
  const T* key = static_cast<const T*>(call.key) + first * call.key_stride + head * width;
  const T* value = static_cast<const T*>(call.value) + first * call.value_stride + head * width;
  T* out = static_cast<T*>(call.out) + first * call.out_stride + head * width;

  transpose_keys(key, call.key_stride, tokens, width, keys, padded);
  for (int64_t t = 0; t < tokens; ++t) widen_row(value + t * call.value_stride, width, 1.f, values + t * wide);
  for (int64_t begin = 0; begin < tokens; begin += kQueries) {
    const int64_t rows = tokens - begin < kQueries ? tokens - begin : kQueries;
    for (int64_t q = 0; q < kQueries; ++q) {
      // the last block repeats its last row, so that nothing undefined is computed
      const T* from = query + (begin + (q < rows ? q : rows - 1)) * call.query_stride;
      widen_row(from, width, call.scale_log2, queries + q * wide);
    }
    multiply_all(queries, wide, keys, padded, width, scores, padded, padded);
    float normalisers[kQueries];
    softmax(scores, tokens, padded, normalisers);
    multiply_all(scores, padded, values, wide, tokens, context, wide, wide);
    for (int64_t q = 0; q < rows; ++q) {
      narrow_row(context + q * wide, width, normalisers[q], out + (begin + q) * call.out_stride);
    }
  }
}

static const Kernels kKernels{attend<float>, attend<Bf16>};
