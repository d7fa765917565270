// Student head on CPU, everything after the narrow projection: single-query attention over the narrow activations with
// folded projections, then the classifier (formulas: fastkd_kernels/ops/student_head.py). One thread, one sequence.
#include "stable_compat.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTKD_X86_DISPATCH 1
#endif
#if defined(__GNUC__)
#define FASTKD_INLINE inline __attribute__((always_inline))
#else
#define FASTKD_INLINE inline
#endif

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Vectors and matrices of one head; matrices are stored [in, out], so that a matrix-vector product runs along rows.
template <typename accum_t>
struct Weights {
  int64_t width;  // D
  int64_t heads;
  int64_t classes;
  const accum_t* query_key;   // [heads, D, D], U_j
  const accum_t* query_bias;  // [heads, D], e_j
  const accum_t* mix;         // [heads, D, D], M_j
  const accum_t* mix_bias;    // [D], m
  const accum_t* classifier;  // [C, D]
  const accum_t* classifier_bias;
};

template <typename scalar_t>
struct Tokens {
  const scalar_t* rows;  // [head_rows, D]
  const scalar_t* tail;  // the rows from head_rows on
  int64_t head_rows;
  int64_t batch;
  int64_t padded;             // T of the padded layout
  const int64_t* lengths;     // [B] or null
  const bool* mask;           // [B, T] or null
  const int64_t* cu_seqlens;  // [B + 1] or null

  int64_t first(int64_t sequence) const {
    return cu_seqlens ? cu_seqlens[sequence] : sequence * padded;
  }
  int64_t length(int64_t sequence) const {
    if (cu_seqlens) return cu_seqlens[sequence + 1] - cu_seqlens[sequence];
    return lengths ? lengths[sequence] : padded;
  }
  bool valid(int64_t sequence, int64_t token) const {
    return !mask || mask[sequence * padded + token];
  }
  const scalar_t* row(int64_t index, int64_t width) const {
    return index < head_rows ? rows + index * width : tail + (index - head_rows) * width;
  }
};

// What one thread needs between the steps of one sequence.
template <typename accum_t>
struct Workspace {
  std::vector<accum_t> row, query, context, dense, scores;

  Workspace(const Weights<accum_t>& weights, int64_t longest)
      : row(weights.width),
        query(weights.heads * weights.width),
        context(weights.heads * weights.width),
        dense(weights.width),
        scores(weights.heads * longest) {}
};

template <typename accum_t>
FASTKD_INLINE accum_t dot(const accum_t* left, const accum_t* right, int64_t size) {
  accum_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += left[i] * right[i];
  return sum;
}

template <typename accum_t>
FASTKD_INLINE void add_scaled(accum_t* target, const accum_t* source, accum_t scale, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) target[i] += scale * source[i];
}

// target[out] += sum_in matrix[in, out] * vector[in]
template <typename accum_t>
FASTKD_INLINE void add_product(accum_t* target, const accum_t* matrix, const accum_t* vector, int64_t size) {
  for (int64_t i = 0; i < size; ++i) add_scaled(target, matrix + i * size, vector[i], size);
}

template <typename accum_t, typename scalar_t>
FASTKD_INLINE const accum_t* widen(const scalar_t* source, accum_t* target, int64_t size) {
  if constexpr (std::is_same_v<accum_t, scalar_t>) return source;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) target[i] = static_cast<accum_t>(source[i]);
  return target;
}

template <typename scalar_t, typename accum_t>
FASTKD_INLINE void attend(
    const Weights<accum_t>& weights, const Tokens<scalar_t>& tokens, int64_t sequence, Workspace<accum_t>& work) {
  const int64_t width = weights.width, first = tokens.first(sequence), length = tokens.length(sequence);
  const accum_t* cls = widen(tokens.row(first, width), work.row.data(), width);
  std::copy_n(weights.query_bias, weights.heads * width, work.query.data());
  for (int64_t head = 0; head < weights.heads; ++head)
    add_product(work.query.data() + head * width, weights.query_key + head * width * width, cls, width);

  // masked tokens are never read: whatever stands there, NaN included, changes nothing
  for (int64_t token = 0; token < length; ++token) {
    if (!tokens.valid(sequence, token)) continue;
    const accum_t* row = widen(tokens.row(first + token, width), work.row.data(), width);
    for (int64_t head = 0; head < weights.heads; ++head)
      work.scores[head * length + token] = dot(work.query.data() + head * width, row, width);
  }

  for (int64_t head = 0; head < weights.heads; ++head) {
    accum_t* scores = work.scores.data() + head * length;
    accum_t largest = -std::numeric_limits<accum_t>::infinity();
    for (int64_t token = 0; token < length; ++token)
      if (tokens.valid(sequence, token)) largest = std::max(largest, scores[token]);
    accum_t total = 0;
    for (int64_t token = 0; token < length; ++token) {
      if (!tokens.valid(sequence, token)) continue;
      scores[token] = std::exp(scores[token] - largest);
      total += scores[token];
    }
    for (int64_t token = 0; token < length; ++token) scores[token] /= total;
  }

  std::fill(work.context.begin(), work.context.end(), accum_t(0));
  for (int64_t token = 0; token < length; ++token) {
    if (!tokens.valid(sequence, token)) continue;
    const accum_t* row = widen(tokens.row(first + token, width), work.row.data(), width);
    for (int64_t head = 0; head < weights.heads; ++head)
      add_scaled(work.context.data() + head * width, row, work.scores[head * length + token], width);
  }
}

template <typename accum_t>
FASTKD_INLINE void classify(const Weights<accum_t>& weights, Workspace<accum_t>& work, accum_t* logits) {
  const int64_t width = weights.width;
  accum_t* dense = work.dense.data();
  std::copy_n(weights.mix_bias, width, dense);
  for (int64_t head = 0; head < weights.heads; ++head)
    add_product(dense, weights.mix + head * width * width, work.context.data() + head * width, width);
  for (int64_t i = 0; i < width; ++i) dense[i] = std::tanh(dense[i]);
  for (int64_t label = 0; label < weights.classes; ++label)
    logits[label] = weights.classifier_bias[label] + dot(weights.classifier + label * width, dense, width);
}

template <typename scalar_t, typename accum_t>
FASTKD_INLINE void run(
    const Weights<accum_t>& weights, const Tokens<scalar_t>& tokens, int64_t begin, int64_t end,
    Workspace<accum_t>& work, accum_t* logits) {
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    attend(weights, tokens, sequence, work);
    classify(weights, work, logits + sequence * weights.classes);
  }
}

template <typename scalar_t, typename accum_t>
using Run = void (*)(
    const Weights<accum_t>&, const Tokens<scalar_t>&, int64_t, int64_t, Workspace<accum_t>&, accum_t*);

template <typename scalar_t, typename accum_t>
void run_baseline(
    const Weights<accum_t>& weights, const Tokens<scalar_t>& tokens, int64_t begin, int64_t end,
    Workspace<accum_t>& work, accum_t* logits) {
  run(weights, tokens, begin, end, work, logits);
}

#ifdef FASTKD_X86_DISPATCH
template <typename scalar_t, typename accum_t>
__attribute__((target("avx2,fma"))) void run_avx2(
    const Weights<accum_t>& weights, const Tokens<scalar_t>& tokens, int64_t begin, int64_t end,
    Workspace<accum_t>& work, accum_t* logits) {
  run(weights, tokens, begin, end, work, logits);
}

template <typename scalar_t, typename accum_t>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512"))) void run_avx512(
    const Weights<accum_t>& weights, const Tokens<scalar_t>& tokens, int64_t begin, int64_t end,
    Workspace<accum_t>& work, accum_t* logits) {
  run(weights, tokens, begin, end, work, logits);
}
#endif

// One binary for every machine: the instruction set is chosen when the op runs.
template <typename scalar_t, typename accum_t>
Run<scalar_t, accum_t> best_run() {
#ifdef FASTKD_X86_DISPATCH
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return run_avx512<scalar_t, accum_t>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return run_avx2<scalar_t, accum_t>;
#endif
  return run_baseline<scalar_t, accum_t>;
}

template <typename scalar_t>
int64_t longest_sequence(const Tokens<scalar_t>& tokens) {
  int64_t longest = 0;
  for (int64_t sequence = 0; sequence < tokens.batch; ++sequence)
    longest = std::max(longest, tokens.length(sequence));
  return longest;
}

template <typename scalar_t, typename accum_t>
void run_parallel(const Weights<accum_t>& weights, const Tokens<scalar_t>& tokens, accum_t* logits) {
  const int64_t workers = std::min<int64_t>(tokens.batch, torch::stable::get_num_threads());
  const int64_t longest = longest_sequence(tokens);
  // allocated here, because nothing may throw inside parallel_for
  std::vector<Workspace<accum_t>> workspaces(workers, Workspace<accum_t>(weights, longest));
  const auto run_range = best_run<scalar_t, accum_t>();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      run_range(weights, tokens, worker * tokens.batch / workers, (worker + 1) * tokens.batch / workers,
                workspaces[worker], logits);
  });
}

template <typename type>
const type* pointer_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const type*>(tensor->const_data_ptr()) : nullptr;
}

template <typename scalar_t, typename accum_t>
void launch(
    const Tensor& rows, const std::optional<Tensor>& tail, int64_t heads, const Tensor& query_key,
    const Tensor& query_bias, const Tensor& mix, const Tensor& mix_bias, const Tensor& classifier,
    const Tensor& classifier_bias, int64_t padded, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens, const Tensor& logits) {
  const auto values = [](const Tensor& tensor) { return static_cast<const accum_t*>(tensor.const_data_ptr()); };
  const Weights<accum_t> weights{
      rows.size(1),      heads,          classifier.size(0),  values(query_key),      values(query_bias),
      values(mix),       values(mix_bias), values(classifier), values(classifier_bias)};
  const Tokens<scalar_t> tokens{
      static_cast<const scalar_t*>(rows.const_data_ptr()),
      pointer_or_null<scalar_t>(tail),
      rows.size(0),
      logits.size(0),
      padded,
      pointer_or_null<int64_t>(lengths),
      pointer_or_null<bool>(mask),
      pointer_or_null<int64_t>(cu_seqlens)};
  run_parallel(weights, tokens, static_cast<accum_t*>(logits.mutable_data_ptr()));
}

// Shapes, dtypes and contiguity are the Python caller's to check; here only what memory safety needs.
Tensor student_head_pool(
    const Tensor& rows, const std::optional<Tensor>& tail, int64_t batch, int64_t padded, int64_t heads,
    const Tensor& query_key, const Tensor& query_bias, const Tensor& mix, const Tensor& mix_bias,
    const Tensor& classifier, const Tensor& classifier_bias, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens) {
  const int64_t width = rows.size(1);
  STD_TORCH_CHECK(query_key.numel() == heads * width * width, "query_key: expected [heads, D, D]");
  STD_TORCH_CHECK(mix.numel() == heads * width * width, "mix: expected [heads, D, D]");
  STD_TORCH_CHECK(query_bias.numel() == heads * width, "query_bias: expected [heads, D]");
  STD_TORCH_CHECK(mix_bias.numel() == width, "mix_bias: expected [D]");
  STD_TORCH_CHECK(classifier.numel() == classifier_bias.numel() * width, "classifier: expected [C, D]");
  const int64_t total = rows.size(0) + (tail.has_value() ? tail->size(0) : 0);
  STD_TORCH_CHECK(cu_seqlens.has_value() || total >= batch * padded, "rows: fewer than B * T tokens");
  const auto logits = torch::stable::new_empty(classifier, {batch, classifier.size(0)});
  if (batch == 0) return logits;

  const auto run_for = [&](auto scalar, auto accum) {
    launch<decltype(scalar), decltype(accum)>(
        rows, tail, heads, query_key, query_bias, mix, mix_bias, classifier, classifier_bias, padded, lengths, mask,
        cu_seqlens, logits);
  };
  const ScalarType type = rows.scalar_type();
  if (type == ScalarType::Float)
    run_for(float(), float());
  else if (type == ScalarType::BFloat16)
    run_for(BFloat16(), float());
  else if (type == ScalarType::Double)
    run_for(double(), double());
  else
    STD_TORCH_CHECK(false, "rows: expected float32, bfloat16 or float64");
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) { m.impl("student_head_pool", TORCH_BOX(&student_head_pool)); }
