// distillation_loss on CPU: labels, the teacher's last layer and its inner layers in one pass over the samples.
#include "distillation.h"

#include <algorithm>
#include <optional>
#include <tuple>

namespace fastkd::distillation {
namespace {

// [M + 1, B] summed over the first dimension.
template <typename scalar_t>
Tensor summed_layers(const Tensor& losses) {
  const int64_t rows = losses.size(0), batch = losses.size(1);
  const Tensor loss = torch::stable::new_empty(losses, {batch});
  const auto* values = static_cast<const scalar_t*>(losses.const_data_ptr());
  auto* out = static_cast<scalar_t*>(loss.mutable_data_ptr());
  std::fill_n(out, batch, scalar_t(0));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t sample = 0; sample < batch; ++sample) out[sample] += values[row * batch + sample];
  return loss;
}

Tensor summed(const Tensor& losses) {
  const bool wide = losses.scalar_type() == ScalarType::Double;
  return wide ? summed_layers<double>(losses) : summed_layers<float>(losses);
}

void check_labels(const Tensor& labels, int64_t batch, int64_t classes) {
  STD_TORCH_CHECK(
      labels.is_cpu() && labels.dim() == 1 && labels.size(0) == batch && labels.scalar_type() == ScalarType::Long &&
          labels.is_contiguous(),
      "labels: expected contiguous int64 [B]");
  const auto* values = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t sample = 0; sample < batch; ++sample)
    STD_TORCH_CHECK(
        values[sample] >= 0 && values[sample] < classes, "labels[", sample, "]: got ", values[sample],
        ", expected 0 to ", classes - 1);
}

std::tuple<Tensor, Tensor, Tensor> distillation_loss_forward(
    const Tensor& student, const Tensor& student_layers, const Tensor& teacher, const Tensor& teacher_layers,
    const std::optional<Tensor>& labels, double ce_scale, double kd_scale, double universal_scale, double temperature,
    double universal_temperature, double attn_scale, int64_t divergence, double beta, int64_t mix,
    int64_t attn_space, bool distance, bool attention_grad, double factor, bool reduce, bool student_gradient, bool layers_gradient) {
  check_layers(student_layers, teacher_layers);
  const int64_t layers = student_layers.size(0), teachers = teacher_layers.size(0);
  const int64_t batch = student_layers.size(1), classes = student_layers.size(2);
  for (const Tensor* logits : {&student, &teacher})
    STD_TORCH_CHECK(
        logits->dim() == 2 && logits->size(0) == batch && logits->size(1) == classes,
        "student, teacher: expected [B, C], with the B and C of the layers");
  check_floating(student, "student");
  check_floating(teacher, "teacher");
  const bool regression = divergence == kSquared;
  if (labels && !regression) check_labels(*labels, batch, classes);
  if (labels && regression) {
    check_floating(*labels, "labels");
    STD_TORCH_CHECK(
        labels->dim() == 2 && labels->size(0) == batch && labels->size(1) == classes, "labels: expected [B, C]");
  }

  const Tensor student_result = gradient_like(student, student_gradient);
  const Tensor layers_result = gradient_like(student_layers, layers_gradient);
  const bool wide = accumulate_type(student, teacher) == ScalarType::Double ||
                    accumulate_type(student_layers, teacher_layers) == ScalarType::Double;
  const ScalarType accumulate = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor losses = torch::stable::new_empty(student, {layers + 1, batch}, accumulate);
  const std::vector<Rows> student_rows = layers_of(student_layers), teacher_rows = layers_of(teacher_layers);
  const std::optional<Rows> scores = labels && regression ? std::optional<Rows>(Rows(*labels, 0)) : std::nullopt;
  const DistillationCall call{
      Rows(student, 0),
      Rows(teacher, 0),
      labels && !regression ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr,
      scores ? &*scores : nullptr,
      ce_scale,
      kd_scale,
      temperature,
      Gradient(student_result),
      UniversalCall{student_rows.data(),
                    teacher_rows.data(),
                    layers,
                    teachers,
                    batch,
                    classes,
                    universal_temperature,
                    universal_scale,
                    attn_scale,
                    Divergence{static_cast<DivergenceKind>(divergence), beta},
                    static_cast<Mix>(mix),
                    static_cast<Space>(attn_space),
                    distance,
                    attention_grad,
                    false,
                    Gradient(layers_result),
                    Gradient()}};
  const RowKernels kernels = kernels_for(accumulate, call.universal.scratch_values());
  share_samples(
      batch, (layers * teachers + 3) * classes, kernels, call.universal.scratch_values(),
      [&](Samples samples, void* scratch) {
        kernels.distillation(call, samples, scratch, losses.mutable_data_ptr());
      });
  return {reduce ? reduced(losses, factor) : summed(losses), student_result, layers_result};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) {
  m.impl("distillation_loss_forward", TORCH_BOX(&distillation_loss_forward));
}

}  // namespace fastkd::distillation
