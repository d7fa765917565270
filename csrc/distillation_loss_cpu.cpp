// distillation_loss on CPU: labels, the teacher's last layer and its inner layers in one pass over the samples.
#include "universal_kd.h"

namespace fastkd::distillation {
namespace {

struct DistillationCall {
  Rows student, teacher;
  const int64_t* classes_of;  // [B] labels, or null
  std::optional<Rows> scores_of;  // [B, C] labels of a regression
  double ce_scale, kd_scale, temperature;
  Gradient student_gradient;
  UniversalCall universal;
};

// Adds ce_scale times the cross entropy, or the squared error of a regression, to the gradient; returns it.
template <typename V>
FASTKD_INLINE V label_loss(const DistillationCall& call, Samples samples, UniversalWorkspace<V>& work) {
  const int64_t size = work.classes;
  const auto scale = static_cast<Scalar<V>>(call.ce_scale);
  if (call.scores_of) {
    widen(*call.scores_of, samples, size, work.scratch);
    for (int64_t c = 0; c < size; ++c) work.scratch[c] = work.student[c] - work.scratch[c];
    add_scaled(work.student_gradient, splat<V>(2 * scale), work.scratch, size);
    return scale * dot(work.scratch, work.scratch, size);
  }
  log_softmax(work.student, Scalar<V>(1), size, work.p_log, work.p);
  V value = splat<V>(0);
  auto* values = reinterpret_cast<Scalar<V>*>(&value);
  auto* log_probs = reinterpret_cast<const Scalar<V>*>(work.p_log);
  auto* probs = reinterpret_cast<Scalar<V>*>(work.p);
  for (int64_t lane = 0; lane < samples.count; ++lane) {
    const int64_t label = call.classes_of[samples.first + lane];
    values[lane] = -scale * log_probs[label * kLanes<V> + lane];
    probs[label * kLanes<V> + lane] -= 1;
  }
  add_scaled(work.student_gradient, splat<V>(scale), work.p, size);
  return value;
}

template <typename V>
FASTKD_INLINE V teacher_loss(const DistillationCall& call, Samples samples, UniversalWorkspace<V>& work) {
  const int64_t size = work.classes;
  const auto inverse_temperature = static_cast<Scalar<V>>(1 / call.temperature);
  const Divergence divergence = call.universal.divergence;
  const Distribution<V> p{work.p_log, work.p}, q{work.q_log, work.q};
  widen(call.teacher, samples, size, work.scratch);
  distribution(work.scratch, inverse_temperature, size, divergence, p);
  distribution(work.student, inverse_temperature, size, divergence, q);
  const V value = divergence_of(p, q, size, divergence, work.p_gradient, work.q_gradient, work.p_terms);
  const V scale = splat<V>(static_cast<Scalar<V>>(call.kd_scale / call.temperature));
  add_scaled(work.student_gradient, scale, work.q_gradient, size);
  return static_cast<Scalar<V>>(call.kd_scale) * value;
}

template <typename V>
FASTKD_INLINE void distillation_rows_inline(
    const DistillationCall& call, Samples range, UniversalWorkspace<V>& work, Scalar<V>* losses) {
  const int64_t size = work.classes, end = range.first + range.count;
  const int64_t last_row = static_cast<int64_t>(call.universal.students.size()) * call.universal.batch;
  for (int64_t first = range.first; first < end; first += kLanes<V>) {
    const Samples samples{first, std::min<int64_t>(kLanes<V>, end - first)};
    widen(call.student, samples, size, work.student);
    fill(work.student_gradient, size, 0);
    V value = teacher_loss(call, samples, work);
    if (call.classes_of || call.scores_of) value += label_loss(call, samples, work);
    write_losses(value, samples, losses + last_row);
    if (call.student_gradient.data) narrow(work.student_gradient, samples, size, call.student_gradient);
    universal_rows(call.universal, samples, work, losses);
  }
}

const InstructionSet instruction_set = choose_instruction_set({"distillation_loss"});

FASTKD_DISPATCH(
    distillation_rows, (const DistillationCall& call, Samples range, UniversalWorkspace<V>& work, Scalar<V>* losses),
    (call, range, work, losses))

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

template <typename V>
Tensor losses_of(const DistillationCall& call, const Tensor& losses, double factor, bool reduce) {
  const UniversalCall& universal = call.universal;
  const auto layers = static_cast<int64_t>(universal.students.size());
  const auto teachers = static_cast<int64_t>(universal.teachers.size());
  parallel_samples(
      universal.batch, kLanes<V>, (layers * teachers + 3) * universal.classes,
      UniversalWorkspace<V>(teachers, universal.classes), [&](Samples range, UniversalWorkspace<V>& work) {
        distillation_rows<V>(call, range, work, static_cast<Scalar<V>*>(losses.mutable_data_ptr()));
      });
  return reduce ? reduced<Scalar<V>>(losses, factor) : summed_layers<Scalar<V>>(losses);
}

void check_labels(const Tensor& labels, int64_t batch, int64_t classes) {
  STD_TORCH_CHECK(
      labels.is_cpu() && labels.dim() == 1 && labels.size(0) == batch && labels.scalar_type() == ScalarType::Long &&
          labels.is_contiguous(),
      "labels: expected a contiguous [B] int64");
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
        "student, teacher: expected [B, C] of the layers' B and C");
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
  const DistillationCall call{
      Rows(student, 0),
      Rows(teacher, 0),
      labels && !regression ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr,
      labels && regression ? std::optional<Rows>(Rows(*labels, 0)) : std::nullopt,
      ce_scale,
      kd_scale,
      temperature,
      Gradient(student_result),
      UniversalCall{layers_of(student_layers),
                    layers_of(teacher_layers),
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
  const bool pack = worth_packing(UniversalWorkspace<Pack>::values(teachers, classes), accumulate);
  const auto compute = pack ? losses_of<Pack> : wide ? losses_of<double> : losses_of<float>;
  return {compute(call, losses, factor, reduce), student_result, layers_result};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) {
  m.impl("distillation_loss_forward", TORCH_BOX(&distillation_loss_forward));
}

}  // namespace fastkd::distillation
