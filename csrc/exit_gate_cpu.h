// The CPU exit gate without tensors, shared by the registered ops and by the eager call that skips the dispatcher.
#pragma once

#include <cstdint>

namespace fastkd {

// numbered as in fastkd_kernels/ops/exit_gate.py
enum Criterion : int64_t { kEntropy, kMaxProb, kMargin, kTopN, kPatience };

enum class LogitsType { kFloat32, kBFloat16, kFloat16 };

// Where the rows that leave are written; every array has a row for each of N sequences.
struct ExitRecord {
  float* logits;        // [N, C]
  float* uncertainty;   // [N]
  int32_t* exit_layer;  // [N]
  int32_t* history;     // [N, 2]
  const void* row_ids;  // [B] int32 or int64, or null for 0..B-1
  bool wide_ids;
  int64_t layer;

  int64_t id(int64_t row) const {
    if (row_ids == nullptr) return row;
    return wide_ids ? static_cast<const int64_t*>(row_ids)[row] : static_cast<const int32_t*>(row_ids)[row];
  }
};

struct ExitGate {
  const void* logits;  // [B, C]
  LogitsType type;
  int64_t rows, columns, row_stride, column_stride;
  Criterion criterion;
  int64_t top_n;
  float speed;
  const float* speeds = nullptr;  // [B], or null where `speed` holds for all
  const ExitRecord* record = nullptr;
};

// Writes uncertainty [B], survivors [B] and count [1]. The caller has checked the arguments.
void exit_gate(const ExitGate& gate, float* uncertainty, int32_t* survivors, int32_t* count);

}  // namespace fastkd
