// Universal-KD on CPU: what its kernel is asked, and the kernel, which universal_kd_rows_*.cpp compile and two losses call.
#pragma once

#include "distillation.h"

namespace fastkd::distillation {

struct UniversalCall {
  std::vector<Rows> students, teachers;  // M and N layers
  int64_t batch, classes;
  double temperature, loss_scale, attn_scale;
  Divergence divergence;
  Mix mix;
  Space space;
  bool distance;        // attention on -|f - s|^2 instead of <f, s>
  bool attention_grad;  // whether the gradient flows through the attention weights
  bool per_layer;       // whether the teacher's gradient keeps the student layers apart
  Gradient student_gradient, teacher_gradient;  // [M, B, C]; [N, B, C], or [M, N, B, C] per layer
};

inline std::vector<Rows> layers_of(const Tensor& tensor) {
  std::vector<Rows> layers;
  layers.reserve(tensor.size(0));
  for (int64_t layer = 0; layer < tensor.size(0); ++layer) layers.emplace_back(tensor, 1, layer * tensor.stride(0));
  return layers;
}

inline void check_layers(const Tensor& student, const Tensor& teacher) {
  check_floating(student, "student");
  check_floating(teacher, "teacher");
  STD_TORCH_CHECK(
      student.dim() == 3 && teacher.dim() == 3 && student.size(1) == teacher.size(1) &&
          student.size(2) == teacher.size(2) && teacher.size(0) > 0,
      "student, teacher: expected [M, B, C] and [N, B, C]");
}

template <typename V>
struct UniversalWorkspace {
  int64_t teachers, classes;
  Scratch<V> memory;

  // [N, C]
  V *logits, *features, *log_probs, *probs, *gradient;
  // [C]
  V *student, *student_features, *student_gradient, *mixed, *p_log, *p, *q_log, *q, *p_gradient, *q_gradient, *p_terms,
      *scratch;
  // [N]
  V *scores, *weights, *score_gradient;

  static int64_t values(int64_t teachers, int64_t classes) {
    return 5 * teachers * classes + 12 * classes + 3 * teachers;
  }

  UniversalWorkspace(int64_t teachers, int64_t classes)
      : teachers(teachers), classes(classes), memory(values(teachers, classes)) {
    V* next = memory.data();
    for (V** tile : {&logits, &features, &log_probs, &probs, &gradient})
      *tile = std::exchange(next, next + teachers * classes);
    for (V** row : {&student, &student_features, &student_gradient, &mixed, &p_log, &p, &q_log, &q, &p_gradient,
                    &q_gradient, &p_terms, &scratch})
      *row = std::exchange(next, next + classes);
    for (V** vector : {&scores, &weights, &score_gradient}) *vector = std::exchange(next, next + teachers);
  }
  UniversalWorkspace(const UniversalWorkspace& other) : UniversalWorkspace(other.teachers, other.classes) {}
  UniversalWorkspace& operator=(const UniversalWorkspace&) = delete;
};

// For the samples of `range`: losses[j * B + b] = loss of sample b in student layer j, and the gradients that are wanted.
template <typename V>
void universal_rows(const UniversalCall& call, Samples range, UniversalWorkspace<V>& work, Scalar<V>* losses);

extern template void universal_rows(const UniversalCall&, Samples, UniversalWorkspace<Pack>&, float*);
extern template void universal_rows(const UniversalCall&, Samples, UniversalWorkspace<float>&, float*);
extern template void universal_rows(const UniversalCall&, Samples, UniversalWorkspace<double>&, double*);

}  // namespace fastkd::distillation
