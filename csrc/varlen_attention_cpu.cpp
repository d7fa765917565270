// Attention over packed sequences on CPU: one task is one head of one sequence, computed in float32 from keys and values
// that fit the first caches. Sequences are as long as a classifier's inputs, so nothing is tiled over keys.
#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "simd.h"

namespace fastkd::varlen_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kQueries = 32;  // as many as share each load of a key or value, at most
// of reading a token and writing its result, in pairs of tokens
constexpr int64_t kTokenCost = 64;
// about 10 microseconds of work: less than that is not worth waking a thread for
constexpr int64_t kCostPerTask = 16384;

struct Attention {
  const void *query, *key, *value;
  void* out;
  int64_t query_stride, key_stride, value_stride, out_stride;  // elements between tokens
  int64_t heads, head_size;
  float scale_log2;  // of the scores, times log2(e)
  int64_t window;    // tokens on each side that a query sees
  const float *cosines, *sines;  // [positions, head_size / 2] each, or null: queries and keys are not turned
};

struct Kernels {
  void (*float32)(const Attention&, int64_t first, int64_t tokens, int64_t head, float* scratch);
  void (*bfloat16)(const Attention&, int64_t first, int64_t tokens, int64_t head, float* scratch);
};

#define FASTKD_SIMD_SOURCE "varlen_attention_simd.h"
#include "simd_levels.h"
#undef FASTKD_SIMD_SOURCE

const Kernels kernels = choose_kernels({"varlen_attention"});

// floats that `attend` needs for one head of a sequence: keys, values, scores, and queries as they are and transposed
int64_t scratch_size(int64_t tokens, int64_t head_size) {
  return 2 * tokens * head_size + kQueries * (2 * head_size + tokens);
}

const char* check_rows(const Tensor& tensor, const Tensor& query) {
  if (tensor.dim() != 3 || tensor.scalar_type() != query.scalar_type() || !tensor.is_cpu()) return "another dtype, rank or device";
  for (int64_t d = 0; d < 3; ++d) {
    if (tensor.size(d) != query.size(d)) return "another shape";
  }
  const bool dense = tensor.numel() == 0 || (tensor.stride(2) == 1 && tensor.stride(1) == tensor.size(2));
  return dense ? nullptr : "rows that are not dense";
}

const float* rotary_table(const std::optional<Tensor>& table, int64_t positions, int64_t head_size) {
  if (!table) return nullptr;
  STD_TORCH_CHECK(
      table->is_cpu() && table->dim() == 2 && table->scalar_type() == ScalarType::Float && table->is_contiguous() &&
          table->size(0) >= positions && 2 * table->size(1) == head_size,
      "rotary: expected contiguous float32 tables [positions, head size / 2]");
  return static_cast<const float*>(table->const_data_ptr());
}

void varlen_attention_cpu(
    Tensor query,
    Tensor key,
    Tensor value,
    Tensor cu_seqlens,
    double scale,
    std::optional<int64_t> given_window,
    std::optional<Tensor> cosines,
    std::optional<Tensor> sines,
    Tensor out) {
  for (const Tensor* tensor : {&query, &key, &value, &out}) {
    const char* problem = check_rows(*tensor, query);
    STD_TORCH_CHECK(problem == nullptr, "query, key, value, out: one has ", problem);
  }
  STD_TORCH_CHECK(
      cu_seqlens.is_cpu() && cu_seqlens.dim() == 1 && cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.is_contiguous() &&
          cu_seqlens.numel() >= 1,
      "cu_seqlens: expected contiguous int32 [B + 1]");
  const auto* bounds = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t sequences = cu_seqlens.numel() - 1, rows = query.size(0), heads = query.size(1);
  STD_TORCH_CHECK(!given_window || *given_window >= 0, "window: expected at least 0");
  STD_TORCH_CHECK(cosines.has_value() == sines.has_value(), "rotary: expected both cosines and sines");
  const int64_t window = given_window ? std::min(*given_window, rows) : rows;
  int64_t longest = 0;
  std::vector<int64_t> costs(sequences + 1);  // of one head of all sequences before each
  STD_TORCH_CHECK(
      bounds[0] == 0 && bounds[sequences] <= rows,
      "cu_seqlens: expected the first value to be 0 and the last at most N");
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t tokens = bounds[b + 1] - bounds[b];
    STD_TORCH_CHECK(tokens >= 0, "cu_seqlens: expected values that never decrease");
    longest = std::max(longest, tokens);
    costs[b + 1] = costs[b] + tokens * (std::min(tokens, 2 * window + kQueries) + kTokenCost);
  }
  const auto dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "query: expected float32 or bfloat16");

  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  check_no_overlap({query, key, value, cu_seqlens}, {out});
  const int64_t used = bounds[sequences];
  const auto row_bytes = static_cast<int64_t>(out.element_size()) * heads * query.size(2);
  // a tensor without elements may have no memory, which memset must not be given
  if (rows > used && row_bytes) {
    std::memset(static_cast<char*>(out.mutable_data_ptr()) + used * row_bytes, 0, (rows - used) * row_bytes);
  }
  if (costs.back() == 0 || heads == 0) return;
  const Attention call{
      query.const_data_ptr(), key.const_data_ptr(), value.const_data_ptr(), out.mutable_data_ptr(),
      query.stride(0),        key.stride(0),        value.stride(0),        out.stride(0),
      heads,                  query.size(2),        static_cast<float>(scale * 1.4426950408889634),
      window,                 rotary_table(cosines, longest, query.size(2)),
      rotary_table(sines, longest, query.size(2))};
  const auto attend = dtype == ScalarType::Float ? kernels.float32 : kernels.bfloat16;
  // threads share out the cost, not the sequences; the heads of a sequence follow one another, so that its rows stay cached
  torch::stable::parallel_for(0, costs.back() * heads, kCostPerTask, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(scratch_size(longest, call.head_size));
    for (int64_t b = 0; b < sequences; ++b) {
      const int64_t cost = costs[b + 1] - costs[b];
      for (int64_t head = 0; head < heads && cost > 0; ++head) {
        const int64_t position = costs[b] * heads + head * cost;
        if (position >= begin && position < end) attend(call, bounds[b], bounds[b + 1] - bounds[b], head, scratch.data());
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) {
  m.impl("varlen_attention_", TORCH_BOX(&varlen_attention_cpu));
}

}  // namespace fastkd::varlen_attention
