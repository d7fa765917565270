// universal_kd_loss on CPU: loss and gradients of all student layers in one pass.
#include "distillation.h"

#include <tuple>

namespace fastkd::distillation {
namespace {

std::tuple<Tensor, Tensor, Tensor> universal_kd_loss_forward(
    const Tensor& student, const Tensor& teacher, double temperature, double loss_scale, double attn_scale,
    int64_t divergence, double beta, int64_t mix, int64_t attn_space, bool distance, bool attention_grad,
    double factor, bool reduce, bool student_gradient, bool teacher_gradient, bool per_layer) {
  check_layers(student, teacher);
  const int64_t layers = student.size(0), teachers = teacher.size(0);
  const int64_t batch = student.size(1), classes = student.size(2);
  const ScalarType accumulate = accumulate_type(student, teacher);
  const Tensor student_result = gradient_like(student, student_gradient);
  const Tensor teacher_result = per_layer && teacher_gradient
                                    ? torch::stable::new_empty(teacher, {layers, teachers, batch, classes}, accumulate)
                                    : gradient_like(teacher, teacher_gradient);
  const Tensor losses = torch::stable::new_empty(student, {layers, batch}, accumulate);
  const std::vector<Rows> student_layers = layers_of(student), teacher_layers = layers_of(teacher);
  const UniversalCall call{student_layers.data(),
                           teacher_layers.data(),
                           layers,
                           teachers,
                           batch,
                           classes,
                           temperature,
                           loss_scale,
                           attn_scale,
                           Divergence{static_cast<DivergenceKind>(divergence), beta},
                           static_cast<Mix>(mix),
                           static_cast<Space>(attn_space),
                           distance,
                           attention_grad,
                           per_layer,
                           Gradient(student_result),
                           Gradient(teacher_result)};
  const RowKernels kernels = kernels_for(accumulate, call.scratch_values());
  share_samples(
      batch, layers * teachers * classes, kernels, call.scratch_values(), [&](Samples samples, void* scratch) {
        kernels.universal(call, samples, scratch, losses.mutable_data_ptr());
      });
  return {reduce ? reduced(losses, factor) : losses, student_result, teacher_result};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) {
  m.impl("universal_kd_loss_forward", TORCH_BOX(&universal_kd_loss_forward));
}

}  // namespace fastkd::distillation
