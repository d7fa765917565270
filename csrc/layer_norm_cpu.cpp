// Layer normalisation on CPU of rows that are sums: of two tensors, or of rows gathered from embedding tables.
#include "stable_compat.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "packed_rows.h"
#include "simd.h"

namespace fastkd::layer_norm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// about 10 microseconds of work: less than that is not worth waking a thread for
constexpr int64_t kElementsPerTask = 64 * 1024;

struct Norm {
  const void *weight, *bias;  // [width]; the bias may be null
  int64_t width;
  float epsilon;
};

struct Kernels {
  // `total`, where it is not null, becomes the sum
  void (*float32)(const void* const* rows, int64_t count, const Norm& norm, float* sums, void* total, void* out);
  void (*bfloat16)(const void* const* rows, int64_t count, const Norm& norm, float* sums, void* total, void* out);
};

#define FASTKD_SIMD_SOURCE "layer_norm_simd.h"
#include "simd_levels.h"
#undef FASTKD_SIMD_SOURCE

const Kernels kernels = choose_kernels({"layer_norm"});

// One of the tensors that are added: row n of the sum takes its row `index[n]`, or row n where there is no index.
struct Addend {
  const char* first;
  int64_t row_bytes;  // between rows
  const int64_t* index;

  const void* row(int64_t n) const {
    return first + (index ? index[n] : n) * row_bytes;
  }
};

void check_rows(const TensorView& tensor, const TensorView& out, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.dim() == 2 && tensor.scalar_type() == out.scalar_type() &&
          tensor.size(1) == out.size(1) && (tensor.stride(1) == 1 || tensor.numel() == 0),
      name, ": expected dense rows as wide as out, in its dtype");
}

void check_vector(const TensorView& tensor, const TensorView& out, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == out.size(1) && tensor.is_contiguous() &&
          tensor.scalar_type() == out.scalar_type(),
      name, ": expected one value for each column of out, in its dtype");
}

// Rows that are written.
struct Target {
  char* first = nullptr;
  int64_t row_bytes = 0;

  void* row(int64_t n) const {
    return first == nullptr ? nullptr : first + n * row_bytes;
  }
};

Target target_of(const TensorView& tensor) {
  return {static_cast<char*>(tensor.mutable_data_ptr()), tensor.stride(0) * tensor.element_size()};
}

void run(
    const std::vector<Addend>& addends, const TensorView& weight, const std::optional<TensorView>& bias, double epsilon,
    const TensorView& out, const std::optional<TensorView>& total) {
  check_rows(out, out, "out");
  check_vector(weight, out, "weight");
  if (bias) check_vector(*bias, out, "bias");
  const auto dtype = out.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "out: expected float32 or bfloat16");
  const auto normalise = dtype == ScalarType::Float ? kernels.float32 : kernels.bfloat16;
  const int64_t rows = out.size(0), width = out.size(1);
  if (rows == 0 || width == 0) return;
  const Norm norm{
      weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, width, static_cast<float>(epsilon)};
  const Target target = target_of(out), totals = total ? target_of(*total) : Target{};
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kElementsPerTask / width), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(width);
    std::vector<const void*> sources(addends.size());
    for (int64_t n = begin; n < end; ++n) {
      for (size_t a = 0; a < addends.size(); ++a) sources[a] = addends[a].row(n);
      normalise(
          sources.data(), static_cast<int64_t>(sources.size()), norm, sums.data(), totals.row(n), target.row(n));
    }
  });
}

Addend addend(const TensorView& tensor, const int64_t* index) {
  return {
      static_cast<const char*>(tensor.const_data_ptr()),
      tensor.stride(0) * tensor.element_size(), index};
}

std::optional<TensorView> view_or_none(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return TensorView::of(*tensor);
}

void add_layer_norm_cpu(
    Tensor x,
    std::optional<Tensor> residual,
    Tensor weight,
    std::optional<Tensor> bias,
    double epsilon,
    Tensor out,
    std::optional<Tensor> total) {
  const TensorView target = TensorView::writable(out);
  std::optional<TensorView> total_view;
  if (total) {
    total_view = TensorView::writable(*total);
    check_rows(*total_view, target, "total");
    STD_TORCH_CHECK(total->size(0) == out.size(0), "total: expected as many rows as out");
  }
  std::vector<Addend> addends;
  for (const Tensor* tensor : {&x, residual ? &*residual : nullptr}) {
    if (tensor == nullptr) continue;
    const TensorView view = TensorView::of(*tensor);
    check_rows(view, target, "x, residual");
    STD_TORCH_CHECK(view.size(0) == target.size(0), "x, residual: expected as many rows as out");
    addends.push_back(addend(view, nullptr));
  }
  run(addends, TensorView::of(weight), view_or_none(bias), epsilon, target, total_view);
}

}  // namespace

void embed_layer_norm(
    const std::vector<TensorView>& tables, const std::vector<TensorView>& indices, const TensorView& weight,
    const std::optional<TensorView>& bias, double epsilon, const TensorView& out) {
  STD_TORCH_CHECK(!tables.empty() && tables.size() == indices.size(), "indices: expected one tensor for each table");
  std::vector<Addend> addends;
  for (size_t t = 0; t < tables.size(); ++t) {
    check_rows(tables[t], out, "tables");
    STD_TORCH_CHECK(
        indices[t].is_cpu() && indices[t].dim() == 1 && indices[t].size(0) == out.size(0) &&
            indices[t].scalar_type() == ScalarType::Long && indices[t].is_contiguous(),
        "indices: expected contiguous int64, one for each row of out");
    const auto* index = static_cast<const int64_t*>(indices[t].const_data_ptr());
    const int64_t rows = tables[t].size(0);
    for (int64_t n = 0; n < out.size(0); ++n) {
      STD_TORCH_CHECK(
          index[n] >= 0 && index[n] < rows, "indices[", t, "][", n, "]: got ", index[n], ", expected 0 to ", rows - 1);
    }
    addends.push_back(addend(tables[t], index));
  }
  run(addends, weight, bias, epsilon, out, std::nullopt);
}

namespace {

void embed_layer_norm_cpu(
    std::vector<Tensor> tables,
    std::vector<Tensor> indices,
    Tensor weight,
    std::optional<Tensor> bias,
    double epsilon,
    Tensor out) {
  std::vector<TensorView> table_views, index_views;
  for (const Tensor& table : tables) table_views.push_back(TensorView::of(table));
  for (const Tensor& index : indices) index_views.push_back(TensorView::of(index));
  embed_layer_norm(
      table_views, index_views, TensorView::of(weight), view_or_none(bias), epsilon, TensorView::writable(out));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) {
  m.impl("add_layer_norm_", TORCH_BOX(&add_layer_norm_cpu));
  m.impl("embed_layer_norm_", TORCH_BOX(&embed_layer_norm_cpu));
}

}  // namespace fastkd::layer_norm
