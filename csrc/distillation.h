// What the distillation losses ask of their kernels on CPU, and what the functions that ask have in common. The kernels know
// no tensors: distillation_rows.h compiles them once for each type of values, in a file of its own.
#pragma once

#include "stable_compat.h"

#include <cstdint>
#include <functional>
#include <vector>

namespace fastkd::distillation {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The codes of the schema, in the order of the tuples in fastkd_kernels/_distillation.py.
enum DivergenceKind : int64_t { kForward, kReverse, kJsd, kSquared };
enum Mix : int64_t { kMixLogits, kMixProbs, kMixLoss };
enum Space : int64_t { kLogits, kLogProbs, kProbs };

struct Divergence {
  DivergenceKind kind;
  double beta;  // the teacher's share of the mixture in kJsd, between 0 and 1
};

// `count` neighbouring samples, as many as V has lanes or fewer.
struct Samples {
  int64_t first, count;
};

// A matrix of logits: one row for every sample of one layer.
struct Rows {
  const void* data;
  ScalarType type;
  int64_t row_stride;
  int64_t column_stride;

  Rows(const void* data, ScalarType type, int64_t row_stride, int64_t column_stride)
      : data(data), type(type), row_stride(row_stride), column_stride(column_stride) {}
  Rows(const Tensor& tensor, int64_t row_dimension, int64_t offset = 0)
      : data(static_cast<const char*>(tensor.const_data_ptr()) + offset * static_cast<int64_t>(tensor.element_size())),
        type(tensor.scalar_type()),
        row_stride(tensor.stride(row_dimension)),
        column_stride(tensor.stride(row_dimension + 1)) {}
};

// A contiguous gradient in the dtype of its input; no data where it is not wanted.
struct Gradient {
  void* data = nullptr;
  ScalarType type = ScalarType::Float;

  Gradient() = default;
  Gradient(void* data, ScalarType type) : data(data), type(type) {}
  explicit Gradient(const Tensor& tensor)
      : data(tensor.numel() ? tensor.mutable_data_ptr() : nullptr), type(tensor.scalar_type()) {}
};

struct KDCall {
  Rows student, teacher;
  int64_t classes;
  double temperature, loss_scale;
  Divergence divergence;
  Gradient student_gradient, teacher_gradient;

  // for each sample at once, as below
  int64_t scratch_values() const { return 7 * classes; }
};

struct UniversalCall {
  const Rows *students, *teachers;
  int64_t layers, teacher_layers;  // M and N
  int64_t batch, classes;
  double temperature, loss_scale, attn_scale;
  Divergence divergence;
  Mix mix;
  Space space;
  bool distance;        // attention on -|f - s|^2 instead of <f, s>
  bool attention_grad;  // whether the gradient flows through the attention weights
  bool per_layer;       // whether the teacher's gradient keeps the student layers apart
  Gradient student_gradient, teacher_gradient;  // [M, B, C]; [N, B, C], or [M, N, B, C] per layer

  int64_t scratch_values() const { return 5 * teacher_layers * classes + 12 * classes + 3 * teacher_layers; }
};

// Labels, the teacher's last layer and its inner layers.
struct DistillationCall {
  Rows student, teacher;
  const int64_t* classes_of;  // [B] labels, or null
  const Rows* scores_of;      // [B, C] labels of a regression, or null
  double ce_scale, kd_scale, temperature;
  Gradient student_gradient;
  UniversalCall universal;
};

// For some samples: losses[j * B + b] = loss of sample b in student layer j, and the gradients that are wanted. The combined
// loss writes what labels and the last layer cost as one more layer. Scratch begins at a multiple of 64 bytes.
struct RowKernels {
  void (*kd)(const KDCall&, Samples, void* scratch, void* losses);
  void (*universal)(const UniversalCall&, Samples, void* scratch, void* losses);
  void (*distillation)(const DistillationCall&, Samples, void* scratch, void* losses);
  int64_t lanes;       // samples at once
  int64_t value_size;  // bytes of a value of all of them
};

RowKernels packed_kernels();
RowKernels float_kernels();
RowKernels double_kernels();

// Those for losses of type `accumulate`; packed ones where scratch of so many values fits into a core's own cache.
RowKernels kernels_for(ScalarType accumulate, int64_t scratch_values);

// Shares the samples of a batch out between the threads as body(samples, scratch).
void share_samples(
    int64_t batch, int64_t work, const RowKernels& kernels, int64_t scratch_values,
    const std::function<void(Samples, void*)>& body);

ScalarType accumulate_type(const Tensor& one, const Tensor& other);

// A contiguous tensor of the shape of `input`, or an empty one where no gradient is wanted. That of float16 waits in
// float32 for the backward pass, whose scale may lift what would underflow.
Tensor gradient_like(const Tensor& input, bool wanted);

void check_floating(const Tensor& tensor, const char* name);

// Of [M, B, C] and [N, B, C].
void check_layers(const Tensor& student, const Tensor& teacher);
std::vector<Rows> layers_of(const Tensor& tensor);

// factor * sum(losses) as a scalar, in an order that the number of threads does not change.
Tensor reduced(const Tensor& losses, double factor);

}  // namespace fastkd::distillation
