// Attention of one head of one sequence; compiled once per instruction set by simd_levels.h. The lanes of a vector are
// queries, so that keys and values are broadcast from where they are and a softmax never reduces across lanes.
#include "simd_vectors.h"

constexpr int kSums = 8;  // vectors that one product accumulates at a time: two multiply-adds a cycle, four cycles each

// to[d][query] = scale * from[query][d] for N * LANES queries; those behind the last repeat it, so that all is defined.
template <int N, typename T>
static inline void transpose_queries(const T* from, int64_t stride, int64_t rows, int64_t width, float scale, float* to) {
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t d = 0; d < width; d += LANES) {
      const int64_t columns = width - d < LANES ? width - d : LANES;
      Floats block[LANES];
      for (int64_t lane = 0; lane < LANES; ++lane) {
        const int64_t query = n * LANES + lane;
        const T* row = from + (query < rows ? query : rows - 1) * stride + d;
        if (columns == LANES) {
          block[lane] = load(row) * scale;
          continue;
        }
        float tail[LANES];
        widen_row(row, columns, scale, tail);
        block[lane] = load(tail);
      }
      transpose(block);
      for (int64_t column = 0; column < columns; ++column) store(to + ((d + column) * N + n) * LANES, block[column]);
    }
  }
}

// The first `rows` of N * LANES columns of from[d][query], times their scale, back to to[query][d].
template <int N, typename T>
static inline void transpose_back(
    const float* from, const Floats* scales, int64_t rows, int64_t width, T* to, int64_t stride) {
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t d = 0; d < width; d += LANES) {
      const int64_t columns = width - d < LANES ? width - d : LANES;
      Floats block[LANES];
      for (int64_t column = 0; column < LANES; ++column) {
        block[column] = load(from + ((column < columns ? d + column : d) * N + n) * LANES) * scales[n];
      }
      transpose(block);
      for (int64_t lane = 0; lane < LANES && n * LANES + lane < rows; ++lane) {
        T* row = to + (n * LANES + lane) * stride + d;
        if (columns == LANES) {
          store(row, block[lane]);
          continue;
        }
        float tail[LANES];
        store(tail, block[lane]);
        narrow_row(tail, columns, 1.f, row);
      }
    }
  }
}

// Turns rows of `width` floats: their halves (a, b) become (a cos - b sin, b cos + a sin), row by row of the tables.
static inline void rotate_rows(float* rows, int64_t count, int64_t width, const float* cosines, const float* sines) {
  const int64_t half = width / 2;
  for (int64_t row = 0; row < count; ++row) {
    float *a = rows + row * width, *b = a + half;
    const float *cosine = cosines + row * half, *sine = sines + row * half;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
      const Floats left = load(a + i), right = load(b + i), c = load(cosine + i), s = load(sine + i);
      store(a + i, left * c - right * s);
      store(b + i, right * c + left * s);
    }
    for (; i < half; ++i) {
      const float left = a[i], right = b[i];
      a[i] = left * cosine[i] - right * sine[i];
      b[i] = right * cosine[i] + left * sine[i];
    }
  }
}

// c[r] = sum_k a[r * row_stride + k * term_stride] b[k] for ROWS rows, each b[k] and c[r] being N vectors.
template <int ROWS, int N>
static inline void multiply(
    const float* a, int64_t row_stride, int64_t term_stride, const float* b, int64_t terms, float* c) {
  Floats sums[ROWS][N] = {};
  for (int64_t k = 0; k < terms; ++k) {
    Floats vectors[N];
    for (int n = 0; n < N; ++n) vectors[n] = load(b + (k * N + n) * LANES);
    for (int row = 0; row < ROWS; ++row) {
      const Floats factor = splat(a[row * row_stride + k * term_stride]);
      for (int n = 0; n < N; ++n) sums[row][n] += factor * vectors[n];
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int n = 0; n < N; ++n) store(c + (row * N + n) * LANES, sums[row][n]);
  }
}

// The same for any number of rows.
template <int N>
static inline void multiply_rows(
    const float* a, int64_t row_stride, int64_t term_stride, const float* b, int64_t terms, float* c, int64_t rows) {
  constexpr int kRows = kSums / N;
  if (rows < kRows) {
    for (int64_t row = 0; row < rows; ++row) {
      multiply<1, N>(a + row * row_stride, row_stride, term_stride, b, terms, c + row * N * LANES);
    }
    return;
  }
  for (int64_t row = 0; row < rows; row += kRows) {
    // the last block starts early and computes some rows again
    const int64_t begin = row + kRows <= rows ? row : rows - kRows;
    multiply<kRows, N>(a + begin * row_stride, row_stride, term_stride, b, terms, c + begin * N * LANES);
  }
}

// Scores of `tokens` keys, in units of log2, become unnormalised weights; normalisers are 1 / their sums.
template <int N>
static inline void softmax(float* scores, int64_t tokens, Floats* normalisers) {
  for (int n = 0; n < N; ++n) {
    Floats largest = load(scores + n * LANES);
    for (int64_t t = 1; t < tokens; ++t) largest = larger(load(scores + (t * N + n) * LANES), largest);
    Floats total{};
    for (int64_t t = 0; t < tokens; ++t) {
      float* at = scores + (t * N + n) * LANES;
      const Floats weights = power_of_two(load(at) - largest);
      store(at, weights);
      total += weights;
    }
    normalisers[n] = 1.f / total;
  }
}

// Keys outside the window of some of the queries weigh nothing there; `ahead` is how far the first key lies behind the
// first query.
template <int N>
static inline void hide_far_keys(float* scores, int64_t tokens, int64_t queries, int64_t ahead, int64_t window) {
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = scores + t * N * LANES;
    const int64_t nearest = t + ahead;  // the query at the key's own position
    const int64_t first = nearest - window < queries ? nearest - window : queries;
    for (int64_t query = 0; query < first; ++query) row[query] = -__builtin_inff();
    for (int64_t query = nearest + window + 1 > 0 ? nearest + window + 1 : 0; query < queries; ++query) {
      row[query] = -__builtin_inff();
    }
  }
}

// Queries `begin` to `begin + queries` of a sequence, which see only keys that are not too far away.
template <int N, typename T>
static inline void attend_block(
    const Attention& call, const T* query, int64_t begin, int64_t queries, const float* keys, const float* values,
    int64_t tokens, T* out, float* scratch) {
  const int64_t width = call.head_size, window = call.window;
  const int64_t first = begin > window ? begin - window : 0;
  const int64_t end = begin + queries + window < tokens ? begin + queries + window : tokens;
  float* transposed = scratch;                       // [width, N * LANES]: queries, later their context
  float* scores = transposed + width * N * LANES;    // [end - first, N * LANES]
  query += begin * call.query_stride;
  if (call.cosines == nullptr) {
    transpose_queries<N>(query, call.query_stride, queries, width, call.scale_log2, transposed);
  } else {
    float* turned = scores;  // as long as there are no scores
    copy_rows(query, call.query_stride, queries, width, turned);
    rotate_rows(turned, queries, width, call.cosines + begin * (width / 2), call.sines + begin * (width / 2));
    transpose_queries<N>(turned, width, queries, width, call.scale_log2, transposed);
  }
  multiply_rows<N>(keys + first * width, width, 1, transposed, width, scores, end - first);
  if (window < tokens) hide_far_keys<N>(scores, end - first, queries, first - begin, window);
  Floats normalisers[N];
  softmax<N>(scores, end - first, normalisers);
  multiply_rows<N>(values + first * width, 1, width, scores, end - first, transposed, width);
  transpose_back<N>(transposed, normalisers, queries, width, out + begin * call.out_stride, call.out_stride);
}

template <typename T>
static void attend(const Attention& call, int64_t first, int64_t tokens, int64_t head, float* scratch) {
  const int64_t width = call.head_size;
  const T* query = static_cast<const T*>(call.query) + first * call.query_stride + head * width;
  const T* key = static_cast<const T*>(call.key) + first * call.key_stride + head * width;
  const T* value = static_cast<const T*>(call.value) + first * call.value_stride + head * width;
  T* out = static_cast<T*>(call.out) + first * call.out_stride + head * width;

  float* keys = scratch;                    // [tokens, width]
  float* values = keys + tokens * width;    // [tokens, width]
  // in place, rows are so far apart that few of them fit the first cache together
  copy_rows(key, call.key_stride, tokens, width, keys);
  copy_rows(value, call.value_stride, tokens, width, values);
  if (call.cosines != nullptr) rotate_rows(keys, tokens, width, call.cosines, call.sines);
  float* rest = values + tokens * width;
  int64_t begin = 0;
  for (; tokens - begin > LANES; begin += 2 * LANES) {
    const int64_t queries = tokens - begin < 2 * LANES ? tokens - begin : 2 * LANES;
    attend_block<2>(call, query, begin, queries, keys, values, tokens, out, rest);
  }
  if (begin < tokens) attend_block<1>(call, query, begin, tokens - begin, keys, values, tokens, out, rest);
}

static const Kernels kKernels{attend<float>, attend<Bf16>};
