// Student head on CPU, everything after the narrow projection: single-query attention over the narrow activations with
// folded projections, then the classifier (formulas: fastkd_kernels/ops/student_head.py), computed in float32.
#include "stable_compat.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "simd.h"

namespace fastkd::student_head {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostSequences = 8;  // in one block, whatever the instruction set

// One call. Matrices are stored [in, out], so that a product with vectors runs along rows.
struct Heads {
  int64_t width;  // D
  int64_t heads;
  int64_t classes;
  const float* query_key;   // [heads, D, D], U_j
  const float* query_bias;  // [heads, D], e_j
  const float* mix;         // [heads, D, D], M_j
  const float* mix_bias;    // [D], m
  const float* classifier;  // [C, D]
  const float* classifier_bias;

  const void* rows;  // [head_rows, D]
  const void* tail;  // the rows from head_rows on
  int64_t head_rows;
  int64_t padded;             // T of the padded layout
  const int64_t* lengths;     // [B] or null
  const bool* mask;           // [B, T] or null
  const int32_t* cu_seqlens;  // [B + 1] or null
  float* logits;              // [B, C]

  int64_t first(int64_t sequence) const {
    return cu_seqlens ? cu_seqlens[sequence] : sequence * padded;
  }
  int64_t length(int64_t sequence) const {
    if (cu_seqlens) return cu_seqlens[sequence + 1] - cu_seqlens[sequence];
    return lengths ? lengths[sequence] : padded;
  }
};

// Answers sequences begin to end; `pointers` has room for one to each token of the longest.
struct Kernels {
  void (*float32)(const Heads&, int64_t begin, int64_t end, float* scratch, const void** pointers);
  void (*bfloat16)(const Heads&, int64_t begin, int64_t end, float* scratch, const void** pointers);
};

#define FASTKD_SIMD_SOURCE "student_head_simd.h"
#include "simd_levels.h"
#undef FASTKD_SIMD_SOURCE

const Kernels kernels = choose_kernels({"student_head"});

// What one thread needs besides.
struct Workspace {
  std::vector<float> scratch;
  std::vector<const void*> pointers;

  // scores are written in whole vectors of up to 16
  Workspace(const Heads& call, int64_t longest)
      : scratch(kMostSequences * (2 * call.heads + 1) * call.width + longest + 16), pointers(longest) {}
};

int64_t longest_sequence(const Heads& call, int64_t batch) {
  int64_t longest = 0;
  for (int64_t sequence = 0; sequence < batch; ++sequence) longest = std::max(longest, call.length(sequence));
  return longest;
}

template <typename type>
const type* pointer_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const type*>(tensor->const_data_ptr()) : nullptr;
}

// Checks that the kernel may read `tensor` as contiguous values of one dtype.
void check_values(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type, name,
      ": expected a contiguous CPU tensor of another dtype");
}

void check_sequences(
    int64_t batch, int64_t padded, int64_t total, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens) {
  STD_TORCH_CHECK(batch >= 0 && padded >= 0, "batch, padded: expected at least 0");
  if (!cu_seqlens) {
    STD_TORCH_CHECK(batch == 0 || padded > 0, "T: got 0, expected a first token in every sequence");
    STD_TORCH_CHECK(batch == 0 || total / padded >= batch, "rows: fewer than B * T tokens");
  }
  if (mask) {
    check_values(*mask, ScalarType::Bool, "mask");
    STD_TORCH_CHECK(mask->numel() == batch * padded, "mask: expected [B, T]");
  }
  if (lengths) {
    check_values(*lengths, ScalarType::Long, "lengths");
    STD_TORCH_CHECK(lengths->numel() == batch, "lengths: expected [B]");
    const auto* values = static_cast<const int64_t*>(lengths->const_data_ptr());
    for (int64_t b = 0; b < batch; ++b) {
      STD_TORCH_CHECK(values[b] >= 1 && values[b] <= padded, "lengths[", b, "]: got ", values[b], ", expected 1 to T");
    }
  }
  if (cu_seqlens) {
    check_values(*cu_seqlens, ScalarType::Int, "cu_seqlens");
    STD_TORCH_CHECK(cu_seqlens->numel() == batch + 1, "cu_seqlens: expected [B + 1]");
    const auto* values = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
    STD_TORCH_CHECK(values[0] == 0 && values[batch] <= total, "cu_seqlens: expected 0 first and at most N last");
    for (int64_t b = 0; b < batch; ++b) {
      STD_TORCH_CHECK(values[b] < values[b + 1], "cu_seqlens: expected rising values");
    }
  }
}

// The Python caller words these errors for its users; here the checks keep memory safe.
Tensor student_head_pool(
    const Tensor& rows, const std::optional<Tensor>& tail, int64_t batch, int64_t padded, int64_t heads,
    const Tensor& query_key, const Tensor& query_bias, const Tensor& mix, const Tensor& mix_bias,
    const Tensor& classifier, const Tensor& classifier_bias, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens) {
  const ScalarType type = rows.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "rows: expected float32 or bfloat16");
  STD_TORCH_CHECK(rows.dim() == 2, "rows: expected [N, D]");
  check_values(rows, type, "rows");
  if (tail) check_values(*tail, type, "tail");
  for (const Tensor* folded : {&query_key, &query_bias, &mix, &mix_bias, &classifier, &classifier_bias}) {
    check_values(*folded, ScalarType::Float, "folded weights");
  }
  const int64_t width = rows.size(1);
  STD_TORCH_CHECK(heads > 0 && classifier.dim() == 2, "classifier: expected [C, D]");
  STD_TORCH_CHECK(!tail || (tail->dim() == 2 && tail->size(1) == width), "tail: expected [N, D]");
  STD_TORCH_CHECK(query_key.numel() == heads * width * width, "query_key: expected [heads, D, D]");
  STD_TORCH_CHECK(mix.numel() == heads * width * width, "mix: expected [heads, D, D]");
  STD_TORCH_CHECK(query_bias.numel() == heads * width, "query_bias: expected [heads, D]");
  STD_TORCH_CHECK(mix_bias.numel() == width, "mix_bias: expected [D]");
  STD_TORCH_CHECK(classifier.numel() == classifier_bias.numel() * width, "classifier: expected [C, D]");
  const int64_t total = rows.size(0) + (tail.has_value() ? tail->size(0) : 0);
  check_sequences(batch, padded, total, lengths, mask, cu_seqlens);
  const auto logits = torch::stable::new_empty(classifier, {batch, classifier.size(0)});
  if (batch == 0) return logits;

  const auto values = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  const Heads call{
      width,
      heads,
      classifier.size(0),
      values(query_key),
      values(query_bias),
      values(mix),
      values(mix_bias),
      values(classifier),
      values(classifier_bias),
      rows.const_data_ptr(),
      pointer_or_null<void>(tail),
      rows.size(0),
      padded,
      pointer_or_null<int64_t>(lengths),
      pointer_or_null<bool>(mask),
      pointer_or_null<int32_t>(cu_seqlens),
      static_cast<float*>(logits.mutable_data_ptr())};
  const auto run = type == ScalarType::Float ? kernels.float32 : kernels.bfloat16;
  const int64_t workers = std::min<int64_t>(batch, torch::stable::get_num_threads());
  // allocated here, because nothing may throw inside parallel_for
  std::vector<Workspace> workspaces(workers, Workspace(call, longest_sequence(call, batch)));
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      Workspace& work = workspaces[worker];
      run(call, worker * batch / workers, (worker + 1) * batch / workers, work.scratch.data(), work.pointers.data());
    }
  });
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) { m.impl("student_head_pool", TORCH_BOX(&student_head_pool)); }

}  // namespace fastkd::student_head
