// The vector code of the CPU kernels without PyTorch, so that every compiler and processor can be asked: prints what each
// op computes from made-up numbers, by the instruction set that it chose. Read by tests/test_instruction_sets.py.
#include "stable_compat.h"

// the ops are called directly: there is no PyTorch to register them with
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) \
  [[maybe_unused]] static void register_nothing(torch::stable::detail::StableLibrary& m)

#include "exit_gate_cpu.cpp"
#include "distillation.h"
#include "layer_norm_cpu.cpp"
#include "student_head_cpu.cpp"
#include "varlen_attention_cpu.cpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace {

std::vector<float> made_up(int64_t count, double step) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(1.5 * std::sin(step * static_cast<double>(i)));
  return values;
}

std::vector<fastkd::Bf16> rounded(const std::vector<float>& values) {
  std::vector<fastkd::Bf16> halves(values.size());
  for (size_t i = 0; i < values.size(); ++i) fastkd::layer_norm::baseline::narrow(values[i], &halves[i]);
  return halves;
}

std::vector<float> widened(const std::vector<fastkd::Bf16>& halves) {
  std::vector<float> values(halves.size());
  for (size_t i = 0; i < halves.size(); ++i) values[i] = fastkd::layer_norm::baseline::widen(halves[i]);
  return values;
}

void print(const char* name, const std::vector<float>& values) {
  std::printf("%s", name);
  for (const float value : values) std::printf(" %.9g", static_cast<double>(value));
  std::printf("\n");
}

void gate_rows(const char* name, int64_t rows, int64_t columns, Criterion criterion) {
  const std::vector<float> logits = made_up(rows * columns, 0.7);
  fastkd::ExitGate gate{};
  gate.logits = logits.data();
  gate.rows = rows;
  gate.columns = gate.row_stride = columns;
  gate.column_stride = 1;
  gate.criterion = criterion;
  gate.top_n = 2;
  std::vector<float> uncertainty(rows);
  Scratch scratch;
  const Call call(gate, uncertainty.data());
  fill_uncertainty(call, logits.data(), columns, 0, rows, scratch);
  print(name, uncertainty);
}

}  // namespace

namespace fastkd::layer_norm {

void normalise_row() {
  const int64_t width = 77;
  const std::vector<float> x = made_up(width, 0.7), y = made_up(width, 1.1), weight = made_up(width, 0.3);
  const void* rows[] = {x.data(), y.data()};
  std::vector<float> sums(width), out(width);
  const Norm norm{weight.data(), y.data(), width, 1e-5f};
  kernels.float32(rows, 2, norm, sums.data(), nullptr, out.data());
  print("layer_norm", out);

  const auto half_x = rounded(x), half_y = rounded(y), half_weight = rounded(weight);
  const void* half_rows[] = {half_x.data(), half_y.data()};
  std::vector<fastkd::Bf16> half_out(width);
  const Norm half_norm{half_weight.data(), half_y.data(), width, 1e-5f};
  kernels.bfloat16(half_rows, 2, half_norm, sums.data(), nullptr, half_out.data());
  print("layer_norm_bfloat16", widened(half_out));
}

}  // namespace fastkd::layer_norm

namespace fastkd::varlen_attention {

void attend_sequence() {
  const int64_t tokens = 45, width = 20;
  const std::vector<float> query = made_up(tokens * width, 0.7), key = made_up(tokens * width, 1.1);
  const std::vector<float> value = made_up(tokens * width, 0.3);
  std::vector<float> out(tokens * width), scratch(scratch_size(tokens, width));
  Attention call{};
  call.query = query.data();
  call.key = key.data();
  call.value = value.data();
  call.out = out.data();
  call.query_stride = call.key_stride = call.value_stride = call.out_stride = width;
  call.heads = 1;
  call.head_size = width;
  call.scale_log2 = 0.2f * 1.4426950408889634f;
  call.window = tokens;
  kernels.float32(call, 0, tokens, 0, scratch.data());
  print("varlen_attention", out);
}

}  // namespace fastkd::varlen_attention

namespace fastkd::student_head {

void classify_sequences() {
  const int64_t batch = 9, tokens = 11, width = 40, heads = 2, classes = 3;
  const std::vector<float> query_key = made_up(heads * width * width, 0.7), query_bias = made_up(heads * width, 1.1);
  const std::vector<float> mix = made_up(heads * width * width, 0.3), mix_bias = made_up(width, 0.9);
  const std::vector<float> classifier = made_up(classes * width, 0.5), classifier_bias = made_up(classes, 1.3);
  const std::vector<float> rows = made_up(batch * tokens * width, 0.17);
  std::vector<float> logits(batch * classes);
  Heads call{};
  call.width = width;
  call.heads = heads;
  call.classes = classes;
  call.query_key = query_key.data();
  call.query_bias = query_bias.data();
  call.mix = mix.data();
  call.mix_bias = mix_bias.data();
  call.classifier = classifier.data();
  call.classifier_bias = classifier_bias.data();
  call.rows = rows.data();
  call.row_stride = width;
  call.head_rows = batch * tokens;
  call.padded = tokens;
  call.logits = logits.data();
  Workspace workspace(call, tokens);
  kernels.float32(call, 0, batch, workspace.scratch.data(), workspace.pointers.data());
  print("student_head", logits);
}

}  // namespace fastkd::student_head

namespace fastkd::distillation {

// Jensen-Shannon divergence of one sample after another, and both gradients with respect to the tempered logits.
void diverge_rows(const char* name, const RowKernels& kernels) {
  const int64_t size = 13, lanes = kernels.lanes;
  const std::vector<float> teacher = made_up(size * lanes, 0.7), student = made_up(size * lanes, 1.1);
  std::vector<float> teacher_gradient(size * lanes), student_gradient(size * lanes);
  const auto rows = [&](const std::vector<float>& values) { return Rows(values.data(), ScalarType::Float, 1, lanes); };
  const auto gradient = [](std::vector<float>& values) { return Gradient(values.data(), ScalarType::Float); };
  const KDCall call{
      rows(student), rows(teacher), size, 2, 2, Divergence{kJsd, 0.3}, gradient(student_gradient),
      gradient(teacher_gradient)};
  std::vector<double> losses(lanes);
  void* scratch = std::aligned_alloc(64, (call.scratch_values() * kernels.value_size + 63) / 64 * 64);
  kernels.kd(call, Samples{0, lanes}, scratch, losses.data());
  std::free(scratch);

  // as the test has them: lane after lane of every class; gradients of a loss that is scaled by the temperature
  std::vector<float> results;
  for (const auto* values : {&teacher_gradient, &student_gradient}) {
    for (int64_t c = 0; c < size; ++c) {
      for (int64_t lane = 0; lane < lanes; ++lane) results.push_back((*values)[lane * size + c]);
    }
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const bool wide = kernels.value_size == sizeof(double);
    const double loss = wide ? losses[lane] : reinterpret_cast<const float*>(losses.data())[lane];
    results.push_back(static_cast<float>(loss / 2));
  }
  print(name, results);
}

}  // namespace fastkd::distillation

int main() {
  for (const auto& [op, name] : fastkd::chosen_instruction_sets()) std::printf("chosen %s %s\n", op, name);
  gate_rows("exit_gate", 35, 19, kEntropy);
  gate_rows("exit_gate_of_long_rows", 3, 1000, kMargin);
  fastkd::layer_norm::normalise_row();
  fastkd::varlen_attention::attend_sequence();
  fastkd::student_head::classify_sequences();
  fastkd::distillation::diverge_rows("divergence_float32", fastkd::distillation::float_kernels());
  fastkd::distillation::diverge_rows("divergence_float64", fastkd::distillation::double_kernels());
  fastkd::distillation::diverge_rows("divergence_packed", fastkd::distillation::packed_kernels());
}
