// Student head on CPU (formulas: fastkd_kernels/ops/student_head.py): single-query attention over the narrow activations
// with folded projections, then the classifier, computed in float32; and before them, where its weights are packed as
// those of an encoder layer, the narrow product.
#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "encoder_layer.h"
#include "packed_rows.h"

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

  const void* rows;    // [head_rows, D]
  int64_t row_stride;  // at least D, also of the tail
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
template <typename Tensor>
void check_values(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type, name,
      ": expected contiguous ", dtype_name(type), " on the CPU, got ", dtype_name(tensor.scalar_type()));
}

void check_bounds(const TensorView& cu_seqlens, int64_t batch, int64_t total) {
  check_values(cu_seqlens, ScalarType::Int, "cu_seqlens");
  STD_TORCH_CHECK(cu_seqlens.numel() == batch + 1, "cu_seqlens: expected [B + 1]");
  const auto* values = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  STD_TORCH_CHECK(
      values[0] == 0 && values[batch] <= total, "cu_seqlens: expected the first value to be 0 and the last at most N");
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(values[b] < values[b + 1], "cu_seqlens: expected values that increase");
  }
}

void check_sequences(
    int64_t batch, int64_t padded, int64_t total, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens) {
  STD_TORCH_CHECK(batch >= 0 && padded >= 0, "batch, padded: expected at least 0");
  if (!cu_seqlens) {
    STD_TORCH_CHECK(batch == 0 || padded > 0, "T: got 0, expected at least one token in every sequence");
    STD_TORCH_CHECK(batch == 0 || total / padded >= batch, "rows: expected at least B * T tokens");
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
  if (cu_seqlens) check_bounds(TensorView::of(*cu_seqlens), batch, total);
}

void check_folded(const Folded& folded, int64_t width) {
  for (const TensorView* weights :
       {&folded.query_key, &folded.query_bias, &folded.mix, &folded.mix_bias, &folded.classifier, &folded.classifier_bias}) {
    check_values(*weights, ScalarType::Float, "folded weights");
  }
  STD_TORCH_CHECK(folded.heads > 0 && folded.classifier.dim() == 2, "classifier: expected [C, D]");
  STD_TORCH_CHECK(folded.query_key.numel() == folded.heads * width * width, "query_key: expected [heads, D, D]");
  STD_TORCH_CHECK(folded.mix.numel() == folded.heads * width * width, "mix: expected [heads, D, D]");
  STD_TORCH_CHECK(folded.query_bias.numel() == folded.heads * width, "query_bias: expected [heads, D]");
  STD_TORCH_CHECK(folded.mix_bias.numel() == width, "mix_bias: expected [D]");
  STD_TORCH_CHECK(
      folded.classifier.numel() == folded.classifier_bias.numel() * width &&
          folded.classifier.size(0) == folded.classifier_bias.numel(),
      "classifier: expected [C, D]");
}

// A call without its rows and sequences.
Heads call_of(const Folded& folded, float* logits) {
  const auto values = [](const TensorView& view) { return static_cast<const float*>(view.const_data_ptr()); };
  Heads call{};
  call.width = folded.mix_bias.numel();
  call.heads = folded.heads;
  call.classes = folded.classifier.size(0);
  call.query_key = values(folded.query_key);
  call.query_bias = values(folded.query_bias);
  call.mix = values(folded.mix);
  call.mix_bias = values(folded.mix_bias);
  call.classifier = values(folded.classifier);
  call.classifier_bias = values(folded.classifier_bias);
  call.logits = logits;
  return call;
}

void answer(const Heads& call, ScalarType type, int64_t batch, int64_t threads) {
  const auto run = type == ScalarType::Float ? kernels.float32 : kernels.bfloat16;
  const int64_t workers = std::min(batch, threads);
  // allocated here, because nothing may throw inside parallel_for
  std::vector<Workspace> workspaces(workers, Workspace(call, longest_sequence(call, batch)));
  const auto work_on = [&](int64_t worker) {
    Workspace& work = workspaces[worker];
    run(call, worker * batch / workers, (worker + 1) * batch / workers, work.scratch.data(), work.pointers.data());
  };
  if (workers == 1) return work_on(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work_on(worker);
  });
}

Folded folded_of(
    int64_t heads, const Tensor& query_key, const Tensor& query_bias, const Tensor& mix, const Tensor& mix_bias,
    const Tensor& classifier, const Tensor& classifier_bias) {
  return {
      heads,
      TensorView::of(query_key),
      TensorView::of(query_bias),
      TensorView::of(mix),
      TensorView::of(mix_bias),
      TensorView::of(classifier),
      TensorView::of(classifier_bias)};
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
  const int64_t width = rows.size(1);
  const Folded folded = folded_of(heads, query_key, query_bias, mix, mix_bias, classifier, classifier_bias);
  check_folded(folded, width);
  STD_TORCH_CHECK(!tail || (tail->dim() == 2 && tail->size(1) == width), "tail: expected [N, D]");
  const int64_t total = rows.size(0) + (tail.has_value() ? tail->size(0) : 0);
  check_sequences(batch, padded, total, lengths, mask, cu_seqlens);
  const auto logits = torch::stable::new_empty(classifier, {batch, classifier.size(0)});
  if (batch == 0) return logits;

  Heads call = call_of(folded, static_cast<float*>(logits.mutable_data_ptr()));
  call.rows = rows.const_data_ptr();
  call.row_stride = width;
  call.tail = pointer_or_null<void>(tail);
  call.head_rows = rows.size(0);
  call.padded = padded;
  call.lengths = pointer_or_null<int64_t>(lengths);
  call.mask = pointer_or_null<bool>(mask);
  call.cu_seqlens = pointer_or_null<int32_t>(cu_seqlens);
  answer(call, type, batch, torch::stable::get_num_threads());
  return logits;
}

// ---- with the narrow product

constexpr int64_t kChunk = 64;  // rows, whose tiles stay in the first cache or close to it
// With fewer rows a thread, waking another one costs more than it takes off.
constexpr int64_t kRowsPerThread = 64;

// tanh(x W0' + b0) of packed rows, whose number is that of the hidden states.
class NarrowProduct {
 public:
  NarrowProduct(const TensorView& hidden_states, const TensorView& panels, const TensorView& bias)
      : number_(number_of(panels)),
        hidden_number_(number_of(hidden_states)),
        hidden_(hidden_states.size(1)),
        weight_{
            static_cast<const char*>(panels.const_data_ptr()),
            static_cast<const float*>(bias.const_data_ptr()),
            nullptr,
            nullptr,
            panels.size(0),
            panels.size(1)},
        from_(static_cast<const char*>(hidden_states.const_data_ptr())) {
    using encoder_layer::kLine;
    using encoder_layer::kPanel;
    const int64_t size = encoder_layer::bytes_of(number_);
    STD_TORCH_CHECK(
        panels.size(2) == kPanel && panels.size(3) * size == 4 &&
            weight_.lines * 4 == encoder_layer::round_up(hidden_ * size, kLine) && bias.numel() == weight_.panel_count * kPanel,
        "narrow: expected panels and bias of [D, H]");
    STD_TORCH_CHECK(
        encoder_layer::chosen_kernels().multiplies[number_],
        "narrow: packed for an instruction set that this process does not use; pack it again");
  }

  int64_t row_stride() const {
    return weight_.panel_count * encoder_layer::kPanel;
  }

  int64_t row_bytes() const {
    return row_stride() * encoder_layer::bytes_of(hidden_number_);
  }

  int64_t scratch() const {
    return kChunk * weight_.lines * 4 + scratch_of_rows();
  }

  void run(int64_t first, int64_t end, char* out, char* scratch) const {
    for (int64_t row = first; row < end; row += kChunk) {
      const int64_t rows = std::min(kChunk, end - row);
      to_tiles(row, rows, scratch + scratch_of_rows(), scratch);
      encoder_layer::Product product{};
      product.weight = &weight_;
      product.number = number_;
      product.rows = scratch + scratch_of_rows();
      product.row_count = rows;
      product.sink = encoder_layer::Sink::kRows;
      product.activation = encoder_layer::kTanh;
      product.out_number = hidden_number_;
      product.out = out + row * row_bytes();
      product.out_stride = row_bytes();
      encoder_layer::chosen_kernels().multiply(product, 0, weight_.panel_count, scratch);
    }
  }

 private:
  static encoder_layer::Number number_of(const TensorView& tensor) {
    return tensor.scalar_type() == ScalarType::Float ? encoder_layer::kFloat32 : encoder_layer::kBFloat16;
  }

  int64_t scratch_of_rows() const {
    using encoder_layer::round_up;
    return round_up(std::max(encoder_layer::kProductScratch, round_up(hidden_, encoder_layer::kPanel) * 4), 64);
  }

  void to_tiles(int64_t first, int64_t rows, char* tiles, char* scratch) const {
    using namespace encoder_layer;
    const int64_t lines = weight_.lines / 16, bytes = hidden_ * bytes_of(hidden_number_);
    const char* from = from_ + first * bytes;
    if (number_ != hidden_number_) {
      RowWork work{};
      work.from = from;
      work.from_number = hidden_number_;
      work.from_stride = bytes;
      work.width = hidden_;
      work.tiles = tiles;
      work.lines = lines;
      work.tile_number = number_;
      return chosen_kernels().work_on_rows(work, 0, rows, scratch);
    }
    for (int64_t row = 0; row < rows; ++row) {
      char* to = tiles + row / kBlock * lines * kTile + row % kBlock * kLine;
      const char* line = from + row * bytes;
      const char* const last = line + bytes - bytes % kLine;
      for (; line < last; line += kLine, to += kTile) std::memcpy(to, line, kLine);
      if (bytes % kLine == 0) continue;
      std::memset(to, 0, kLine);
      std::memcpy(to, line, bytes % kLine);
    }
  }

  encoder_layer::Number number_, hidden_number_;
  int64_t hidden_;
  encoder_layer::Weight weight_;
  const char* from_;
};

}  // namespace

void student_head_packed(
    const TensorView& hidden_states, const TensorView& narrow, const TensorView& narrow_bias, const Folded& folded,
    const TensorView& cu_seqlens, float* logits) {
  const ScalarType type = hidden_states.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16, "hidden_states: expected float32 or bfloat16");
  STD_TORCH_CHECK(hidden_states.dim() == 2, "hidden_states: expected [R, H]");
  check_values(hidden_states, type, "hidden_states");
  const ScalarType packed = narrow.scalar_type();
  STD_TORCH_CHECK(
      packed == ScalarType::Float || packed == type, "narrow: expected float32 or the dtype of hidden_states");
  STD_TORCH_CHECK(narrow.dim() == 4, "narrow: expected panels");
  check_values(narrow, packed, "narrow");
  check_values(narrow_bias, ScalarType::Float, "narrow_bias");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1, "cu_seqlens: expected [B + 1]");
  const int64_t batch = cu_seqlens.numel() - 1;
  check_bounds(cu_seqlens, batch, hidden_states.size(0));
  const int64_t width = folded.mix_bias.numel();
  check_folded(folded, width);
  const NarrowProduct product(hidden_states, narrow, narrow_bias);
  STD_TORCH_CHECK(
      product.row_stride() == encoder_layer::round_up(width, encoder_layer::kPanel),
      "narrow: expected D rows of the weight");
  if (batch == 0) return;

  const auto* bounds = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t rows = bounds[batch];
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, rows / kRowsPerThread));
  static thread_local Arena arena;
  const int64_t scratch = encoder_layer::round_up(product.scratch(), 4096);
  char* const memory = arena.take(threads * scratch + rows * product.row_bytes());
  char* const narrowed = memory + threads * scratch;
  const auto work_on = [&](int64_t t) {
    // whole blocks of rows, so that two threads share no tile
    const int64_t blocks = (rows + kChunk - 1) / kChunk;
    const int64_t first = blocks * t / threads * kChunk, end = std::min(rows, blocks * (t + 1) / threads * kChunk);
    product.run(first, end, narrowed, memory + t * scratch);
  };
  if (threads == 1) {
    work_on(0);
  } else {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) work_on(t);
    });
  }
  Heads call = call_of(folded, logits);
  call.rows = narrowed;
  call.row_stride = product.row_stride();
  call.head_rows = rows;
  call.cu_seqlens = bounds;
  answer(call, type, batch, threads);
}

namespace {

Tensor student_head_packed_cpu(
    const Tensor& hidden_states, const Tensor& narrow, const Tensor& narrow_bias, int64_t heads,
    const Tensor& query_key, const Tensor& query_bias, const Tensor& mix, const Tensor& mix_bias,
    const Tensor& classifier, const Tensor& classifier_bias, const Tensor& cu_seqlens) {
  STD_TORCH_CHECK(classifier.dim() == 2, "classifier: expected [C, D]");
  STD_TORCH_CHECK(cu_seqlens.numel() >= 1, "cu_seqlens: expected [B + 1]");
  const auto logits = torch::stable::new_empty(classifier, {cu_seqlens.numel() - 1, classifier.size(0)});
  STD_TORCH_CHECK(classifier.scalar_type() == ScalarType::Float, "classifier: expected float32");
  student_head_packed(
      TensorView::of(hidden_states), TensorView::of(narrow), TensorView::of(narrow_bias),
      folded_of(heads, query_key, query_bias, mix, mix_bias, classifier, classifier_bias), TensorView::of(cu_seqlens),
      static_cast<float*>(logits.mutable_data_ptr()));
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) {
  m.impl("student_head_pool", TORCH_BOX(&student_head_pool));
  m.impl("student_head_packed", TORCH_BOX(&student_head_packed_cpu));
}

}  // namespace fastkd::student_head
