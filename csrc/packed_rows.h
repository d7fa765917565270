// What runs on packed rows one after the other, on views of tensors: as registered ops, and as one call of packed_stage.cpp.
// Each checks what keeps memory safe; its Python caller words the errors for users.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tensor_view.h"

namespace fastkd {

namespace layer_norm {
void embed_layer_norm(
    const std::vector<TensorView>& tables, const std::vector<TensorView>& indices, const TensorView& weight,
    const std::optional<TensorView>& bias, double epsilon, const TensorView& out);
}

namespace encoder_layer {
void encoder_layers(
    const TensorView& hidden_states, const TensorView& cu_seqlens, const std::vector<TensorView>& packed,
    const std::vector<TensorView>& rotary, const TensorView& out);
}

namespace student_head {

// The folded weights.
struct Folded {
  int64_t heads;
  TensorView query_key, query_bias, mix, mix_bias, classifier, classifier_bias;
};

// Writes `logits` [B, C], contiguous float32.
void student_head_packed(
    const TensorView& hidden_states, const TensorView& narrow, const TensorView& narrow_bias, const Folded& folded,
    const TensorView& cu_seqlens, float* logits);

}  // namespace student_head

}  // namespace fastkd
