// kd_loss on CPU: loss and gradients of every row in one pass.
#include "distillation.h"

namespace fastkd::distillation {
namespace {

struct KDCall {
  Rows student, teacher;
  int64_t classes;
  double temperature, loss_scale;
  Divergence divergence;
  Gradient student_gradient, teacher_gradient;
};

constexpr int64_t kScratchRows = 7;

template <typename V>
FASTKD_INLINE void kd_rows_inline(const KDCall& call, Samples range, Scratch<V>& workspace, Scalar<V>* losses) {
  const int64_t size = call.classes;
  V* row = workspace.data();
  V *logits = row, *p_gradient = row + size, *q_gradient = row + 2 * size;
  const Distribution<V> p{row + 3 * size, row + 4 * size}, q{row + 5 * size, row + 6 * size};
  V* p_terms = logits;  // free again once both distributions are there

  const auto inverse_temperature = static_cast<Scalar<V>>(1 / call.temperature);
  const V loss_scale = splat<V>(static_cast<Scalar<V>>(call.loss_scale));
  const V gradient_scale = splat<V>(static_cast<Scalar<V>>(call.loss_scale / call.temperature));
  const int64_t end = range.first + range.count;
  for (int64_t first = range.first; first < end; first += kLanes<V>) {
    const Samples samples{first, std::min<int64_t>(kLanes<V>, end - first)};
    widen(call.teacher, samples, size, logits);
    distribution(logits, inverse_temperature, size, call.divergence, p);
    widen(call.student, samples, size, logits);
    distribution(logits, inverse_temperature, size, call.divergence, q);
    const V value = divergence_of(p, q, size, call.divergence, p_gradient, q_gradient, p_terms);
    write_losses(loss_scale * value, samples, losses);
    for (int64_t c = 0; c < size; ++c) {
      q_gradient[c] *= gradient_scale;
      p_gradient[c] *= gradient_scale;
    }
    if (call.student_gradient.data) narrow(q_gradient, samples, size, call.student_gradient);
    if (call.teacher_gradient.data) narrow(p_gradient, samples, size, call.teacher_gradient);
  }
}

const InstructionSet instruction_set = choose_instruction_set({"kd_loss", "fused_linear_kd_loss"});

FASTKD_DISPATCH(
    kd_rows, (const KDCall& call, Samples range, Scratch<V>& workspace, Scalar<V>* losses),
    (call, range, workspace, losses))

template <typename V>
Tensor losses_of(const KDCall& call, const Tensor& losses, double factor, bool reduce) {
  parallel_samples(
      losses.numel(), kLanes<V>, 2 * call.classes, Scratch<V>(kScratchRows * call.classes),
      [&](Samples range, Scratch<V>& workspace) {
        kd_rows<V>(call, range, workspace, static_cast<Scalar<V>*>(losses.mutable_data_ptr()));
      });
  return reduce ? reduced<Scalar<V>>(losses, factor) : losses;
}

std::tuple<Tensor, Tensor, Tensor> kd_loss_forward(
    const Tensor& student, const Tensor& teacher, double temperature, double loss_scale, int64_t divergence,
    double beta, double factor, bool reduce, bool student_gradient, bool teacher_gradient) {
  check_floating(student, "student");
  check_floating(teacher, "teacher");
  STD_TORCH_CHECK(
      student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0) &&
          student.size(1) == teacher.size(1),
      "student, teacher: expected two [B, C] of one shape");
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
  const auto compute = worth_packing(kScratchRows * classes, accumulate) ? losses_of<Pack>
                       : accumulate == ScalarType::Float                ? losses_of<float>
                                                                         : losses_of<double>;
  return {compute(call, losses, factor, reduce), student_result, teacher_result};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) { m.impl("kd_loss_forward", TORCH_BOX(&kd_loss_forward)); }

}  // namespace fastkd::distillation
