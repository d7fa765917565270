// kd_loss on CPU: loss and gradients of every row in one pass.
#include "distillation.h"

#include <tuple>

namespace fastkd::distillation {
namespace {

std::tuple<Tensor, Tensor, Tensor> kd_loss_forward(
    const Tensor& student, const Tensor& teacher, double temperature, double loss_scale, int64_t divergence,
    double beta, double factor, bool reduce, bool student_gradient, bool teacher_gradient) {
  check_floating(student, "student");
  check_floating(teacher, "teacher");
  STD_TORCH_CHECK(
      student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0) &&
          student.size(1) == teacher.size(1),
      "student, teacher: expected the same shape [B, C]");
  const int64_t batch = student.size(0), classes = student.size(1);
  const Tensor student_result = gradient_like(student, student_gradient);
  const Tensor teacher_result = gradient_like(teacher, teacher_gradient);
  const ScalarType accumulate = accumulate_type(student, teacher);
  const Tensor losses = torch::stable::new_empty(student, {batch}, accumulate);
  const KDCall call{Rows(student, 0),
                    Rows(teacher, 0),
                    classes,
                    temperature,
                    loss_scale,
                    Divergence{static_cast<DivergenceKind>(divergence), beta},
                    Gradient(student_result),
                    Gradient(teacher_result)};
  const RowKernels kernels = kernels_for(accumulate, call.scratch_values());
  share_samples(batch, 2 * classes, kernels, call.scratch_values(), [&](Samples samples, void* scratch) {
    kernels.kd(call, samples, scratch, losses.mutable_data_ptr());
  });
  return {reduce ? reduced(losses, factor) : losses, student_result, teacher_result};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) { m.impl("kd_loss_forward", TORCH_BOX(&kd_loss_forward)); }

}  // namespace fastkd::distillation
