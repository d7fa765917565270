// What the losses of distillation.h share on CPU: checks, and samples shared out between threads.
#include "distillation.h"

#include <algorithm>
#include <new>

namespace fastkd::distillation {
namespace {

// Memory that no thread shares with another, uninitialised.
class Scratch {
 public:
  explicit Scratch(int64_t size) : values_(static_cast<char*>(::operator new(size, kAlignment))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(values_, kAlignment); }
  char* data() { return values_; }

 private:
  static constexpr std::align_val_t kAlignment{64};  // what AVX-512 expects of 16 floats
  char* values_;
};

template <typename scalar_t>
Tensor reduced_as(const Tensor& losses, double factor) {
  double total = 0;
  const auto* values = static_cast<const scalar_t*>(losses.const_data_ptr());
  for (int64_t row = 0; row < losses.numel(); ++row) total += values[row];
  const Tensor loss = torch::stable::new_empty(losses, {});
  *static_cast<scalar_t*>(loss.mutable_data_ptr()) = static_cast<scalar_t>(factor * total);
  return loss;
}

}  // namespace

RowKernels kernels_for(ScalarType accumulate, int64_t scratch_values) {
  constexpr int64_t kCacheBytes = 512 * 1024;
  if (accumulate == ScalarType::Double) return double_kernels();
  const RowKernels packed = packed_kernels();
  return scratch_values * packed.value_size <= kCacheBytes ? packed : float_kernels();
}

void share_samples(
    int64_t batch, int64_t work, const RowKernels& kernels, int64_t scratch_values,
    const std::function<void(Samples, void*)>& body) {
  const int64_t groups = (batch + kernels.lanes - 1) / kernels.lanes;
  // a thread gets no less than some 8192 logits: below that, waking it takes longer than the work
  const int64_t useful = std::clamp<int64_t>(batch * work / 8192, 1, std::max<int64_t>(groups, 1));
  const int64_t workers = useful == 1 ? 1 : std::min<int64_t>(useful, torch::stable::get_num_threads());
  const int64_t scratch_bytes = (scratch_values * kernels.value_size + 63) / 64 * 64;
  // allocated here, because nothing may throw inside parallel_for
  Scratch scratch(workers * scratch_bytes);
  const auto work_for = [&](int64_t worker) {
    const int64_t first = worker * groups / workers * kernels.lanes;
    const int64_t last = std::min((worker + 1) * groups / workers * kernels.lanes, batch);
    if (first < last) body(Samples{first, last - first}, scratch.data() + worker * scratch_bytes);
  };
  if (workers == 1) return work_for(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work_for(worker);
  });
}

ScalarType accumulate_type(const Tensor& one, const Tensor& other) {
  const bool wide = one.scalar_type() == ScalarType::Double || other.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

Tensor gradient_like(const Tensor& input, bool wanted) {
  const ScalarType type = input.scalar_type() == ScalarType::Half ? ScalarType::Float : input.scalar_type();
  if (!wanted) return torch::stable::new_empty(input, {0}, type);
  const std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  return torch::stable::new_empty(input, shape, type);
}

void check_floating(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      tensor.is_cpu() && (type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                          type == ScalarType::Half),
      name, ": expected float32, float64, bfloat16 or float16 on CPU");
}

void check_layers(const Tensor& student, const Tensor& teacher) {
  check_floating(student, "student");
  check_floating(teacher, "teacher");
  STD_TORCH_CHECK(
      student.dim() == 3 && teacher.dim() == 3 && student.size(1) == teacher.size(1) &&
          student.size(2) == teacher.size(2) && teacher.size(0) > 0,
      "student, teacher: expected [M, B, C] and [N, B, C]");
}

std::vector<Rows> layers_of(const Tensor& tensor) {
  std::vector<Rows> layers;
  layers.reserve(tensor.size(0));
  for (int64_t layer = 0; layer < tensor.size(0); ++layer) layers.emplace_back(tensor, 1, layer * tensor.stride(0));
  return layers;
}

Tensor reduced(const Tensor& losses, double factor) {
  const bool wide = losses.scalar_type() == ScalarType::Double;
  return wide ? reduced_as<double>(losses, factor) : reduced_as<float>(losses, factor);
}

}  // namespace fastkd::distillation
