// The CPU exit gate without tensors, shared by the registered ops and by the eager call that skips the dispatcher.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "tensor_view.h"

namespace fastkd {

// numbered and named as in CRITERIA of fastkd_kernels/ops/exit_gate.py, to which a test holds this list
enum Criterion : int64_t { kEntropy, kMaxProb, kMargin, kTopN, kPatience };
constexpr int64_t kCriteria = kPatience + 1;
constexpr std::array<const char*, kCriteria> kCriterionNames{"entropy", "max_prob", "margin", "top_n", "patience"};
static_assert(kCriterionNames.back() != nullptr, "every criterion has a name");

// Whether the gate can compute a criterion of `columns` classes; patience needs a record besides.
constexpr bool is_valid(int64_t criterion, int64_t top_n, int64_t columns) {
  return criterion >= 0 && criterion < kCriteria && (criterion != kTopN || (top_n >= 2 && top_n <= columns));
}

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

// A record as it is given.
struct RecordViews {
  TensorView logits, uncertainty, exit_layer, history;
  std::optional<TensorView> row_ids;
  int64_t layer;
};

// A gate without a record, whose arguments are checked: what keeps memory safe. Its logits may come later.
ExitGate checked_gate(
    const TensorView& logits, double speed, int64_t criterion, int64_t top_n, const std::optional<TensorView>& speeds);

// The record of a checked gate.
ExitRecord checked_record(const ExitGate& gate, const RecordViews& views);

// Writes uncertainty [B], survivors [B] and count [1]. The caller has checked the arguments.
void exit_gate(const ExitGate& gate, float* uncertainty, int32_t* survivors, int32_t* count);

}  // namespace fastkd
