// Universal-KD for a few samples: every student layer against the attention-weighted teacher layers, value and gradients
// (formulas: fastkd_kernels/ops/universal_kd_loss.py). Part of distillation_rows_simd.h.

template <typename V>
struct UniversalWorkspace {
  int64_t teachers, classes;

  // [N, C]
  V *logits, *features, *log_probs, *probs, *gradient;
  // [C]
  V *student, *student_features, *student_gradient, *mixed, *p_log, *p, *q_log, *q, *p_gradient, *q_gradient, *p_terms,
      *scratch;
  // [N]
  V *scores, *weights, *score_gradient;

  UniversalWorkspace(const UniversalCall& call, void* memory) : teachers(call.teacher_layers), classes(call.classes) {
    V* next = static_cast<V*>(memory);
    const auto take = [&](int64_t count) {
      V* here = next;
      next += count;
      return here;
    };
    V** tiles[] = {&logits, &features, &log_probs, &probs, &gradient};
    V** rows[] = {&student, &student_features, &student_gradient, &mixed, &p_log, &p, &q_log, &q, &p_gradient,
                  &q_gradient, &p_terms, &scratch};
    V** vectors[] = {&scores, &weights, &score_gradient};
    for (V** tile : tiles) *tile = take(teachers * classes);
    for (V** row : rows) *row = take(classes);
    for (V** vector : vectors) *vector = take(teachers);
  }
};

// What attention compares; a masked class contributes nothing.
template <typename V>
FASTKD_OUTLINED void features_of(const V* logits, int64_t size, Space space, V* out, V* scratch) {
  if (space == kProbs) return log_softmax(logits, Scalar<V>(1), size, scratch, out);
  const V* source = logits;
  if (space == kLogProbs) {
    log_softmax(logits, Scalar<V>(1), size, out, scratch);
    source = out;
  }
  const V zero = splat<V>(0), masked = minus_infinity<V>();
#pragma omp simd
  for (int64_t c = 0; c < size; ++c) out[c] = logits[c] == masked ? zero : source[c];
}

// target += the gradient of <features(logits), gradient> with respect to the logits; overwrites `gradient`.
template <typename V>
FASTKD_OUTLINED void add_features_gradient(
    const V* logits, const V* features, V* gradient, int64_t size, Space space, V* target) {
  const V zero = splat<V>(0), masked = minus_infinity<V>();
  if (space == kProbs) {
    const V mean = dot(features, gradient, size);
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) target[c] += features[c] * (gradient[c] - mean);
    return;
  }
#pragma omp simd
  for (int64_t c = 0; c < size; ++c) {
    gradient[c] = logits[c] == masked ? zero : gradient[c];
    target[c] += gradient[c];
  }
  if (space == kLogits) return;
  const V total = sum(gradient, size);
#pragma omp simd
  for (int64_t c = 0; c < size; ++c)
    target[c] -= logits[c] == masked ? zero : total * exponential(features[c]);
}

// out = features of teacher layer i minus those of the student; classes masked in either are 0.
template <typename V>
FASTKD_INLINE void differences(const UniversalWorkspace<V>& work, int64_t i, V* out) {
  const V *f = work.features + i * work.classes, *f_logits = work.logits + i * work.classes;
  const V zero = splat<V>(0), masked = minus_infinity<V>();
#pragma omp simd
  for (int64_t c = 0; c < work.classes; ++c) {
    const V delta = f[c] - work.student_features[c];
    out[c] = work.student[c] == masked ? zero : (f_logits[c] == masked ? zero : delta);
  }
}

// work.scores = log lambda, work.weights = lambda
template <typename V>
FASTKD_INLINE void attend(const UniversalCall& call, UniversalWorkspace<V>& work) {
  const V scale = splat<V>(static_cast<Scalar<V>>(call.attn_scale));
  for (int64_t i = 0; i < work.teachers; ++i) {
    if (call.distance) {
      differences(work, i, work.scratch);
      work.scores[i] = -scale * dot(work.scratch, work.scratch, work.classes);
    } else {
      work.scores[i] = scale * dot(work.features + i * work.classes, work.student_features, work.classes);
    }
  }
  log_softmax(work.scores, Scalar<V>(1), work.teachers, work.scores, work.weights);
}

// Adds what reaches student and teachers through the attention scores.
template <typename V>
FASTKD_INLINE void add_attention_gradient(const UniversalCall& call, UniversalWorkspace<V>& work) {
  const int64_t size = work.classes;
  V* student = work.p_gradient;  // free by now
  fill(student, size, 0);
  for (int64_t i = 0; i < work.teachers; ++i) {
    const V* f = work.features + i * size;
    V* teacher = work.scratch;
    V slope = splat<V>(static_cast<Scalar<V>>(call.attn_scale)) * work.score_gradient[i];
    if (call.distance) {
      slope = slope + slope;
      differences(work, i, teacher);
      add_scaled(student, slope, teacher, size);
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) teacher[c] *= -slope;
    } else {
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) {
        teacher[c] = slope * work.student_features[c];
        student[c] += slope * f[c];
      }
    }
    if (call.teacher_gradient.data)
      add_features_gradient(work.logits + i * size, f, teacher, size, call.space, work.gradient + i * size);
  }
  add_features_gradient(work.student, work.student_features, student, size, call.space, work.student_gradient);
}

// F = sum_i lambda_i f_i against s.
template <typename V>
FASTKD_INLINE V mix_logits(const UniversalCall& call, UniversalWorkspace<V>& work) {
  const int64_t size = work.classes;
  const V zero = splat<V>(0), masked = minus_infinity<V>();
  fill(work.mixed, size, 0);
  for (int64_t i = 0; i < work.teachers; ++i) {
    const V* f = work.logits + i * size;
    const V weight = work.weights[i];
    // a class masked in one teacher layer is masked in the mixture, even where its weight underflows to 0
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) work.mixed[c] += f[c] == masked ? masked : weight * f[c];
  }
  const Distribution<V> p{work.p_log, work.p}, q{work.q_log, work.q};
  distribution(work.mixed, static_cast<Scalar<V>>(1 / call.temperature), size, call.divergence, p);
  const V value = divergence_of(p, q, size, call.divergence, work.p_gradient, work.q_gradient, work.p_terms);

  const V scale = splat<V>(static_cast<Scalar<V>>(call.loss_scale / call.temperature));
  add_scaled(work.student_gradient, scale, work.q_gradient, size);
  for (int64_t i = 0; i < work.teachers; ++i) {
    const V* f = work.logits + i * size;
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) work.scratch[c] = work.mixed[c] == masked ? zero : f[c] - work.mixed[c];
    const V weight = scale * work.weights[i];
    work.score_gradient[i] = weight * dot(work.scratch, work.p_gradient, size);
    if (call.teacher_gradient.data) add_scaled(work.gradient + i * size, weight, work.p_gradient, size);
  }
  return value;
}

// log p = log sum_i lambda_i softmax(f_i / tau), by log-sum-exp over the layers: the plain sum may underflow.
template <typename V>
FASTKD_INLINE void mixture(UniversalWorkspace<V>& work) {
  const int64_t size = work.classes;
  const V zero = splat<V>(0), masked = minus_infinity<V>();
  V* top = work.scratch;
  fill(top, size, -__builtin_inff());
  fill(work.p, size, 0);
  for (int64_t i = 0; i < work.teachers; ++i)
    for (int64_t c = 0; c < size; ++c) top[c] = larger(top[c], work.scores[i] + work.log_probs[i * size + c]);
  for (int64_t i = 0; i < work.teachers; ++i)
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) {
      const V joint = work.scores[i] + work.log_probs[i * size + c];
      work.p[c] += joint == masked ? zero : exponential(joint - top[c]);
    }
  for (int64_t c = 0; c < size; ++c) {
    work.p_log[c] = top[c] == masked ? masked : top[c] + logarithm(work.p[c]);
    work.p[c] = exponential(work.p_log[c]);
  }
}

// p = sum_i lambda_i softmax(f_i / tau) against q.
template <typename V>
FASTKD_INLINE V mix_probs(const UniversalCall& call, UniversalWorkspace<V>& work) {
  const int64_t size = work.classes;
  const V zero = splat<V>(0), masked = minus_infinity<V>();
  mixture(work);
  const Distribution<V> p{work.p_log, work.p}, q{work.q_log, work.q};
  const V value = divergence_of(p, q, size, call.divergence, work.p_gradient, work.q_gradient, work.p_terms);

  const V loss_scale = splat<V>(static_cast<Scalar<V>>(call.loss_scale));
  const V scale = splat<V>(static_cast<Scalar<V>>(call.loss_scale / call.temperature));
  add_scaled(work.student_gradient, scale, work.q_gradient, size);
  V total = zero;
  for (int64_t i = 0; i < work.teachers; ++i) {
    // lambda_i p_i / p, at most 1, shares each class's slope out between the layers
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) {
      const V joint = work.scores[i] + work.log_probs[i * size + c];
      work.scratch[c] = joint == masked ? zero : exponential(joint - work.p_log[c]) * work.p_terms[c];
    }
    const V slope = sum(work.scratch, size);
    work.score_gradient[i] = loss_scale * slope;
    total += work.score_gradient[i];
    if (!call.teacher_gradient.data) continue;
    add_scaled(work.gradient + i * size, scale, work.scratch, size);
    add_scaled(work.gradient + i * size, -scale * slope, work.probs + i * size, size);
  }
  add_scaled(work.score_gradient, -total, work.weights, work.teachers);
  return value;
}

// sum_i lambda_i D(f_i, s).
template <typename V>
FASTKD_INLINE V mix_losses(const UniversalCall& call, UniversalWorkspace<V>& work) {
  const int64_t size = work.classes;
  const V loss_scale = splat<V>(static_cast<Scalar<V>>(call.loss_scale));
  const V scale = splat<V>(static_cast<Scalar<V>>(call.loss_scale / call.temperature));
  const Distribution<V> q{work.q_log, work.q};
  V value = splat<V>(0);
  for (int64_t i = 0; i < work.teachers; ++i) {
    const Distribution<V> p{work.log_probs + i * size, work.probs + i * size};
    const V weight = scale * work.weights[i];
    work.score_gradient[i] =
        divergence_of(p, q, size, call.divergence, work.p_gradient, work.q_gradient, work.p_terms);
    value += work.weights[i] * work.score_gradient[i];
    add_scaled(work.student_gradient, weight, work.q_gradient, size);
    if (call.teacher_gradient.data) add_scaled(work.gradient + i * size, weight, work.p_gradient, size);
  }
  for (int64_t i = 0; i < work.teachers; ++i)
    work.score_gradient[i] = loss_scale * work.weights[i] * (work.score_gradient[i] - value);
  return value;
}

template <typename V>
FASTKD_INLINE void write_teacher_gradient(
    const UniversalCall& call, int64_t layer, Samples samples, UniversalWorkspace<V>& work) {
  for (int64_t i = 0; i < work.teachers; ++i)
    narrow(
        work.gradient + i * work.classes, samples, work.classes, call.teacher_gradient,
        (layer * work.teachers + i) * call.batch);
  fill(work.gradient, work.teachers * work.classes, 0);
}

template <typename V>
FASTKD_OUTLINED void universal_samples(
    const UniversalCall& call, Samples samples, UniversalWorkspace<V>& work, Scalar<V>* losses) {
  const int64_t size = work.classes, layers = call.layers;
  const auto inverse_temperature = static_cast<Scalar<V>>(1 / call.temperature);
  const bool gradients = call.student_gradient.data || call.teacher_gradient.data;
  for (int64_t i = 0; i < work.teachers; ++i) {
    V* f = work.logits + i * size;
    widen(call.teachers[i], samples, size, f);
    features_of(f, size, call.space, work.features + i * size, work.scratch);
    const Distribution<V> p{work.log_probs + i * size, work.probs + i * size};
    if (call.mix != kMixLogits) distribution(f, inverse_temperature, size, call.divergence, p);
  }
  fill(work.gradient, work.teachers * size, 0);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Distribution<V> q{work.q_log, work.q};
    widen(call.students[layer], samples, size, work.student);
    features_of(work.student, size, call.space, work.student_features, work.scratch);
    distribution(work.student, inverse_temperature, size, call.divergence, q);
    attend(call, work);
    fill(work.student_gradient, size, 0);
    const V value = call.mix == kMixLogits  ? mix_logits(call, work)
                    : call.mix == kMixProbs ? mix_probs(call, work)
                                            : mix_losses(call, work);
    write_losses(splat<V>(static_cast<Scalar<V>>(call.loss_scale)) * value, samples, losses + layer * call.batch);
    if (call.attention_grad && gradients) add_attention_gradient(call, work);
    if (call.student_gradient.data)
      narrow(work.student_gradient, samples, size, call.student_gradient, layer * call.batch);
    if (call.teacher_gradient.data && call.per_layer) write_teacher_gradient(call, layer, samples, work);
  }
  if (call.teacher_gradient.data && !call.per_layer) write_teacher_gradient(call, 0, samples, work);
}

template <typename V>
static void universal_rows(const UniversalCall& call, Samples range, void* scratch, void* losses) {
  UniversalWorkspace<V> work(call, scratch);
  const int64_t end = range.first + range.count;
  for (int64_t first = range.first; first < end; first += kLanes<V>)
    universal_samples(call, some_samples<V>(first, end), work, static_cast<Scalar<V>*>(losses));
}
