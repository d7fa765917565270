// Exit gate on CPU: uncertainty of every row, decision, compaction and the record of the rows that leave.
#include "stable_compat.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "exit_gate_cpu.h"
#include "simd.h"

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using fastkd::Bf16;
using fastkd::Criterion;
using fastkd::kEntropy;
using fastkd::kMargin;
using fastkd::kMaxProb;
using fastkd::kPatience;
using fastkd::kTopN;

constexpr int64_t kTileRows = 16;
// wider rows are vectorised along the row instead of across rows
constexpr int64_t kMaxTileColumns = 256;
// interleaved logits of one block of tiles: several, so that none is read before its stores have left the store buffer
constexpr int64_t kBlockElements = kTileRows * kMaxTileColumns;
constexpr int64_t kMaxBlockTiles = 16;
// about 3 microseconds of work: less than that is not worth waking a thread for
constexpr int64_t kElementsPerTask = 16384;

struct Kernels {
  int64_t lanes;
  void (*interleave)(const float* rows, int64_t stride, float* tile);
  void (*tile)(const float* tile, int64_t columns, Criterion criterion, float scale, float* out);
  float (*row)(const float* row, int64_t columns, Criterion criterion, float scale);
};

#define FASTKD_SIMD_SOURCE "exit_gate_simd.h"
#include "simd_levels.h"
#undef FASTKD_SIMD_SOURCE

const Kernels kernels = choose_kernels({"exit_gate"});

// One call, with what is derived from its arguments.
struct Call : fastkd::ExitGate {
  float* uncertainty;  // [B]
  int64_t terms;       // how many logits the uncertainty of a row is made of
  float scale;         // by what it is divided

  Call(const fastkd::ExitGate& gate, float* uncertainty)
      : ExitGate(gate), uncertainty(uncertainty), terms(gate.criterion == kTopN ? gate.top_n : gate.columns) {
    scale = static_cast<float>(criterion == kMaxProb ? 1 - 1.0 / columns : std::log(static_cast<double>(terms)));
  }

  bool stays(int64_t row) const {
    const float limit = speeds ? speeds[row] : speed;
    // written so that a NaN stays
    return !(uncertainty[row] <= limit) || limit == 0.f;
  }
};

// One task's scratch, which grows once to what a tile of rows needs.
struct Scratch {
  std::vector<float> rows, selected, order;
};

// The rows [begin, end) as contiguous float rows: the logits themselves where they are that already.
template <typename T>
const float* float_rows(const Call& gate, int64_t begin, int64_t end, std::vector<float>& scratch, int64_t& stride) {
  const T* logits = static_cast<const T*>(gate.logits);
  if constexpr (std::is_same_v<T, float>) {
    if (gate.column_stride == 1) {
      stride = gate.row_stride;
      return logits + begin * gate.row_stride;
    }
  }
  stride = gate.columns;
  scratch.resize((end - begin) * gate.columns);
  for (int64_t row = begin; row < end; ++row) {
    const T* from = logits + row * gate.row_stride;
    float* to = scratch.data() + (row - begin) * stride;
    if (gate.column_stride == 1) {
      for (int64_t c = 0; c < gate.columns; ++c) to[c] = static_cast<float>(from[c]);
    } else {
      for (int64_t c = 0; c < gate.columns; ++c) to[c] = static_cast<float>(from[c * gate.column_stride]);
    }
  }
  return scratch.data();
}

// The n largest of a row; n NaNs where it holds a NaN, which no comparison would rank.
void select_largest(const float* row, int64_t columns, int64_t n, std::vector<float>& order, float* to) {
  if (std::any_of(row, row + columns, [](float x) { return x != x; })) {
    std::fill(to, to + n, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  order.assign(row, row + columns);
  if (n < columns) std::nth_element(order.begin(), order.begin() + n, order.end(), std::greater<>());
  std::copy(order.begin(), order.begin() + n, to);
}

void interleave(const float* rows, int64_t stride, int64_t count, int64_t columns, float* tile) {
  int64_t c = 0;
  if (count == kTileRows) {
    for (; c + kernels.lanes <= columns; c += kernels.lanes) kernels.interleave(rows + c, stride, tile + c * kTileRows);
    const Kernels& narrow = baseline::kKernels;
    for (; c + narrow.lanes <= columns; c += narrow.lanes) narrow.interleave(rows + c, stride, tile + c * kTileRows);
  }
  for (; c < columns; ++c) {
    for (int64_t r = 0; r < count; ++r) tile[c * kTileRows + r] = rows[r * stride + c];
    for (int64_t r = count; r < kTileRows; ++r) tile[c * kTileRows + r] = 0.f;
  }
}

// How often in a row the label was repeated, as 1 / (1 + repeats); NaN where the logits have no finite maximum.
float patience(const float* row, int64_t columns, int32_t* history) {
  int64_t label = 0;
  bool nan = false;
  for (int64_t c = 0; c < columns; ++c) {
    nan |= row[c] != row[c];
    if (row[c] > row[label]) label = c;
  }
  if (nan || !std::isfinite(row[label])) {
    history[0] = -1;
    history[1] = 0;
    return std::numeric_limits<float>::quiet_NaN();
  }
  history[1] = label == history[0] ? history[1] + 1 : 0;
  history[0] = static_cast<int32_t>(label);
  return 1.f / (1.f + static_cast<float>(history[1]));
}

void fill_uncertainty(const Call& gate, const float* rows, int64_t stride, int64_t begin, int64_t count, Scratch& scratch) {
  float* out = gate.uncertainty + begin;
  if (gate.criterion == kPatience) {
    for (int64_t r = 0; r < count; ++r) {
      out[r] = patience(rows + r * stride, gate.columns, gate.record->history + 2 * gate.record->id(begin + r));
    }
    return;
  }
  const int64_t terms = gate.terms;
  if (gate.criterion == kTopN) {
    scratch.selected.resize(count * terms);
    for (int64_t r = 0; r < count; ++r) {
      select_largest(rows + r * stride, gate.columns, terms, scratch.order, scratch.selected.data() + r * terms);
    }
    rows = scratch.selected.data();
    stride = terms;
  }
  if (terms > kMaxTileColumns) {
    for (int64_t r = 0; r < count; ++r) out[r] = kernels.row(rows + r * stride, terms, gate.criterion, gate.scale);
    return;
  }
  alignas(64) float tiles[kBlockElements];
  const int64_t tile_elements = kTileRows * terms;
  float* tile = tiles;
  for (int64_t r = 0; r < count; r += kTileRows, tile += tile_elements) {
    interleave(rows + r * stride, stride, std::min(kTileRows, count - r), terms, tile);
  }
  tile = tiles;
  for (int64_t r = 0; r < count; r += kTileRows, tile += tile_elements) {
    if (count - r >= kTileRows) {
      kernels.tile(tile, terms, gate.criterion, gate.scale, out + r);
      continue;
    }
    float results[kTileRows];
    kernels.tile(tile, terms, gate.criterion, gate.scale, results);
    std::memcpy(out + r, results, (count - r) * sizeof(float));
  }
}

void write_leaving(const Call& gate, const float* rows, int64_t stride, int64_t begin, int64_t count) {
  const fastkd::ExitRecord& record = *gate.record;
  for (int64_t r = 0; r < count; ++r) {
    if (gate.stays(begin + r)) continue;
    const int64_t id = record.id(begin + r);
    std::memcpy(record.logits + id * gate.columns, rows + r * stride, gate.columns * sizeof(float));
    record.uncertainty[id] = gate.uncertainty[begin + r];
    record.exit_layer[id] = static_cast<int32_t>(record.layer);
  }
}

template <typename T>
void decide(const Call& gate) {
  const int64_t block_tiles = std::clamp<int64_t>(kBlockElements / (kTileRows * gate.terms), 1, kMaxBlockTiles);
  const int64_t block_rows = block_tiles * kTileRows;
  auto task = [&](int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t begin = first * block_rows; begin < std::min(last * block_rows, gate.rows); begin += block_rows) {
      const int64_t count = std::min(block_rows, gate.rows - begin);
      int64_t stride = 0;
      const float* rows = float_rows<T>(gate, begin, begin + count, scratch.rows, stride);
      fill_uncertainty(gate, rows, stride, begin, count, scratch);
      if (gate.record != nullptr) write_leaving(gate, rows, stride, begin, count);
    }
  };
  const int64_t blocks = (gate.rows + block_rows - 1) / block_rows;
  const int64_t blocks_per_task = std::max<int64_t>(1, kElementsPerTask / (block_rows * gate.columns));
  if (blocks <= blocks_per_task) return task(0, blocks);
  torch::stable::parallel_for(0, blocks, blocks_per_task, task);
}

int32_t list_survivors(const Call& gate, int32_t* survivors) {
  int32_t kept = 0;
  for (int64_t row = 0; row < gate.rows; ++row) {
    // always written and kept by moving on: no branch to mispredict, and never past the end, as kept <= row
    survivors[kept] = static_cast<int32_t>(row);
    kept += gate.stays(row);
  }
  // undefined by contract, but the same in every run
  std::fill(survivors + kept, survivors + gate.rows, -1);
  return kept;
}

}  // namespace

void fastkd::exit_gate(const ExitGate& gate, float* uncertainty, int32_t* survivors, int32_t* count) {
  const Call call(gate, uncertainty);
  if (gate.type == LogitsType::kFloat32) {
    decide<float>(call);
  } else if (gate.type == LogitsType::kBFloat16) {
    decide<BFloat16>(call);
  } else {
    decide<Half>(call);
  }
  *count = list_survivors(call, survivors);
}

namespace {

using fastkd::TensorView;

fastkd::LogitsType logits_type(const TensorView& logits) {
  const ScalarType dtype = logits.scalar_type();
  if (dtype == ScalarType::Float) return fastkd::LogitsType::kFloat32;
  if (dtype == ScalarType::BFloat16) return fastkd::LogitsType::kBFloat16;
  STD_TORCH_CHECK(dtype == ScalarType::Half, "logits: expected float32, bfloat16 or float16");
  return fastkd::LogitsType::kFloat16;
}

// The data of a contiguous CPU tensor of one dtype and size.
template <typename T>
T* checked_data(const TensorView& tensor, ScalarType dtype, int64_t size, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == size,
      name,
      ": expected ",
      size,
      " contiguous elements of ",
      fastkd::dtype_name(dtype),
      " on the CPU, got ",
      tensor.numel(),
      " of ",
      fastkd::dtype_name(tensor.scalar_type()));
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace

// fastkd_kernels.exit_gate words these errors for its users; here the checks keep memory safe.
fastkd::ExitGate fastkd::checked_gate(
    const TensorView& logits, double speed, int64_t criterion, int64_t top_n, const std::optional<TensorView>& speeds) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected [B, C]");
  fastkd::ExitGate gate{};
  gate.logits = logits.const_data_ptr();
  gate.type = logits_type(logits);
  gate.rows = logits.size(0);
  gate.columns = logits.size(1);
  gate.row_stride = logits.stride(0);
  gate.column_stride = logits.stride(1);
  gate.criterion = static_cast<Criterion>(criterion);
  gate.top_n = top_n;
  gate.speed = static_cast<float>(speed);
  STD_TORCH_CHECK(gate.columns >= 2, "logits: expected at least 2 classes");
  STD_TORCH_CHECK(gate.rows <= std::numeric_limits<int32_t>::max(), "logits: expected at most 2**31 - 1 rows");
  STD_TORCH_CHECK(criterion >= 0 && criterion < fastkd::kCriteria, "criterion: unknown");
  STD_TORCH_CHECK(fastkd::is_valid(criterion, top_n, gate.columns), "top_n: expected 2 to C");
  STD_TORCH_CHECK(speed >= 0 && speed <= 1, "speed: expected 0 to 1");
  if (!speeds.has_value()) return gate;
  gate.speeds = checked_data<float>(*speeds, ScalarType::Float, gate.rows, "speeds");
  for (int64_t row = 0; row < gate.rows; ++row) {
    STD_TORCH_CHECK(gate.speeds[row] >= 0 && gate.speeds[row] <= 1, "speeds: expected 0 to 1");
  }
  return gate;
}

fastkd::ExitRecord fastkd::checked_record(const ExitGate& gate, const RecordViews& views) {
  const int64_t capacity = views.exit_layer.numel();
  ExitRecord record{};
  record.logits = checked_data<float>(views.logits, ScalarType::Float, capacity * gate.columns, "record.logits");
  record.uncertainty = checked_data<float>(views.uncertainty, ScalarType::Float, capacity, "record.uncertainty");
  record.exit_layer = checked_data<int32_t>(views.exit_layer, ScalarType::Int, capacity, "record.exit_layer");
  record.history = checked_data<int32_t>(views.history, ScalarType::Int, 2 * capacity, "record.history");
  record.layer = views.layer;
  if (views.row_ids) {
    record.wide_ids = views.row_ids->scalar_type() == ScalarType::Long;
    record.row_ids = checked_data<const void>(
        *views.row_ids, record.wide_ids ? ScalarType::Long : ScalarType::Int, gate.rows, "row_ids");
  }
  for (int64_t row = 0; row < gate.rows; ++row) {
    STD_TORCH_CHECK(record.id(row) >= 0 && record.id(row) < capacity, "row_ids: expected row numbers of the record");
  }
  return record;
}

namespace {

using Decision = std::tuple<Tensor, Tensor, Tensor>;

Tensor allocate(int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &size, &stride, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::optional<TensorView> view_or_none(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return TensorView::of(*tensor);
}

Decision run(const fastkd::ExitGate& gate) {
  Tensor uncertainty = allocate(gate.rows, aoti_torch_dtype_float32());
  Tensor survivors = allocate(gate.rows, aoti_torch_dtype_int32());
  Tensor count = allocate(1, aoti_torch_dtype_int32());
  fastkd::exit_gate(
      gate,
      static_cast<float*>(uncertainty.data_ptr()),
      static_cast<int32_t*>(survivors.data_ptr()),
      static_cast<int32_t*>(count.data_ptr()));
  return {std::move(uncertainty), std::move(survivors), std::move(count)};
}

Decision exit_gate_op(
    const Tensor& logits, double speed, int64_t criterion, int64_t top_n, const std::optional<Tensor>& speeds) {
  STD_TORCH_CHECK(criterion != kPatience, "criterion: 'patience' needs a record");
  return run(fastkd::checked_gate(TensorView::of(logits), speed, criterion, top_n, view_or_none(speeds)));
}

Decision exit_gate_record_op(
    const Tensor& logits,
    double speed,
    int64_t criterion,
    int64_t top_n,
    const std::optional<Tensor>& speeds,
    const std::optional<Tensor>& row_ids,
    const Tensor& exit_logits,
    const Tensor& exit_uncertainty,
    const Tensor& exit_layer,
    const Tensor& history,
    int64_t layer) {
  fastkd::ExitGate gate = fastkd::checked_gate(TensorView::of(logits), speed, criterion, top_n, view_or_none(speeds));
  const fastkd::ExitRecord record = fastkd::checked_record(
      gate,
      {TensorView::writable(exit_logits), TensorView::writable(exit_uncertainty), TensorView::writable(exit_layer),
       TensorView::writable(history), view_or_none(row_ids), layer});
  gate.record = &record;
  return run(gate);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, library) {
  library.impl("exit_gate", TORCH_BOX(&exit_gate_op));
  library.impl("exit_gate_record", TORCH_BOX(&exit_gate_record_op));
}
