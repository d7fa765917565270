// The rows of the losses of distillation.h; compiled once per instruction set by simd_levels.h.
#include "distillation_simd.h"

// As many samples from `first` on as are computed at once.
template <typename V>
FASTKD_INLINE Samples some_samples(int64_t first, int64_t end) {
  return {first, end - first < kLanes<V> ? end - first : kLanes<V>};
}

#include "universal_kd_simd.h"

template <typename V>
static void kd_rows(const KDCall& call, Samples range, void* scratch, void* losses) {
  const int64_t size = call.classes;
  V* row = static_cast<V*>(scratch);
  V *logits = row, *p_gradient = row + size, *q_gradient = row + 2 * size;
  const Distribution<V> p{row + 3 * size, row + 4 * size}, q{row + 5 * size, row + 6 * size};
  V* p_terms = logits;  // free again once both distributions are there

  const auto inverse_temperature = static_cast<Scalar<V>>(1 / call.temperature);
  const V loss_scale = splat<V>(static_cast<Scalar<V>>(call.loss_scale));
  const V gradient_scale = splat<V>(static_cast<Scalar<V>>(call.loss_scale / call.temperature));
  const int64_t end = range.first + range.count;
  for (int64_t first = range.first; first < end; first += kLanes<V>) {
    const Samples samples = some_samples<V>(first, end);
    widen(call.teacher, samples, size, logits);
    distribution(logits, inverse_temperature, size, call.divergence, p);
    widen(call.student, samples, size, logits);
    distribution(logits, inverse_temperature, size, call.divergence, q);
    const V value = divergence_of(p, q, size, call.divergence, p_gradient, q_gradient, p_terms);
    write_losses(loss_scale * value, samples, static_cast<Scalar<V>*>(losses));
    for (int64_t c = 0; c < size; ++c) {
      q_gradient[c] *= gradient_scale;
      p_gradient[c] *= gradient_scale;
    }
    if (call.student_gradient.data) narrow(q_gradient, samples, size, call.student_gradient);
    if (call.teacher_gradient.data) narrow(p_gradient, samples, size, call.teacher_gradient);
  }
}

// Adds ce_scale times the cross entropy, or the squared error of a regression, to the gradient; returns it.
template <typename V>
FASTKD_OUTLINED V label_loss(const DistillationCall& call, Samples samples, UniversalWorkspace<V>& work) {
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
static void distillation_rows(const DistillationCall& call, Samples range, void* scratch, void* all_losses) {
  UniversalWorkspace<V> work(call.universal, scratch);
  auto* losses = static_cast<Scalar<V>*>(all_losses);
  const int64_t size = work.classes, end = range.first + range.count;
  const int64_t last_row = call.universal.layers * call.universal.batch;
  for (int64_t first = range.first; first < end; first += kLanes<V>) {
    const Samples samples = some_samples<V>(first, end);
    widen(call.student, samples, size, work.student);
    fill(work.student_gradient, size, 0);
    V value = teacher_loss(call, samples, work);
    if (call.classes_of || call.scores_of) value += label_loss(call, samples, work);
    write_losses(value, samples, losses + last_row);
    if (call.student_gradient.data) narrow(work.student_gradient, samples, size, call.student_gradient);
    universal_samples(call.universal, samples, work, losses);
  }
}

static const Kernels kKernels{kd_rows<Value>, universal_rows<Value>, distillation_rows<Value>, kLanes<Value>, sizeof(Value)};
