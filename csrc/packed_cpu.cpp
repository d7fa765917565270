// pack, unpack and compact_packed on CPU: each moves whole sequences, which are contiguous ranges of rows on both sides.
#include "memory.h"

#include <algorithm>
#include <cstring>
#include <optional>

namespace fastkd::packed {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this, waking another thread takes longer than copying.
constexpr int64_t kBytesPerThread = 128 * 1024;

// One sequence: `rows` rows go from row `source` to row `target`, and `zeros` rows behind them become zero.
struct Move {
  int64_t source, target, rows, zeros;
};

const int32_t* read_vector(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.dim() == 1 && tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous(), name,
      ": expected a contiguous int32 vector");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// Sequence b is rows bounds[b] to bounds[b + 1] of a tensor of `rows` rows.
const int32_t* read_bounds(const Tensor& cu_seqlens, int64_t rows) {
  const int32_t* bounds = read_vector(cu_seqlens, "cu_seqlens");
  const int64_t sequences = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(sequences >= 0, "cu_seqlens: got no values, expected [B + 1]");
  STD_TORCH_CHECK(bounds[0] == 0, "cu_seqlens: expected the first value to be 0");
  for (int64_t b = 0; b < sequences; ++b) {
    STD_TORCH_CHECK(bounds[b] <= bounds[b + 1], "cu_seqlens[", b + 1, "]: it is less than the value before it");
  }
  STD_TORCH_CHECK(
      bounds[sequences] <= rows,
      "cu_seqlens: the last value is ", bounds[sequences], ", but there are ", rows, " rows");
  return bounds;
}

// Rows of [rows, ...] tensors, or of [B, T, ...] ones taken as [B * T, ...].
int64_t row_count(const Tensor& tensor, int64_t row_dims) {
  return row_dims == 2 ? tensor.size(0) * tensor.size(1) : tensor.size(0);
}

void move_all(
    const std::vector<Tensor>& tensors,
    int64_t source_dims,
    std::vector<Tensor>& out,
    int64_t target_dims,
    const std::vector<Move>& moves) {
  STD_TORCH_CHECK(tensors.size() == out.size(), "out: got ", out.size(), " tensors for ", tensors.size());
  check_no_overlap(tensors, out);
  int64_t moved_rows = 0;
  for (const Move& move : moves) moved_rows += move.rows + move.zeros;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Tensor& source = tensors[t];
    Tensor& target = out[t];
    STD_TORCH_CHECK(
        source.is_cpu() && target.is_cpu() && source.is_contiguous() && target.is_contiguous() &&
            source.scalar_type() == target.scalar_type() && source.dim() >= source_dims && target.dim() >= target_dims,
        "tensors, out: expected contiguous tensors, each pair of one dtype");
    const auto item = static_cast<int64_t>(source.element_size());
    int64_t row_bytes = item;
    for (int64_t d = source_dims; d < source.dim(); ++d) row_bytes *= source.size(d);
    int64_t target_bytes = item;
    for (int64_t d = target_dims; d < target.dim(); ++d) target_bytes *= target.size(d);
    STD_TORCH_CHECK(row_bytes == target_bytes, "out: expected the trailing shapes of tensors");
    // sequences lie the same number of rows apart in every tensor
    STD_TORCH_CHECK(
        (source_dims < 2 || source.size(1) == tensors[0].size(1)) && (target_dims < 2 || target.size(1) == out[0].size(1)),
        "tensors, out: expected the same T in all of them");
    const int64_t source_rows = row_count(source, source_dims), target_rows = row_count(target, target_dims);
    for (const Move& move : moves) {
      STD_TORCH_CHECK(
          move.source >= 0 && move.rows >= 0 && move.source + move.rows <= source_rows &&
              move.target + move.rows + move.zeros <= target_rows,
          "out: it has ", target_rows, " rows, too few for the sequences");
    }
    // a tensor without elements may have no memory, which memcpy must not be given
    if (moved_rows * row_bytes == 0) continue;
    const auto* from = static_cast<const char*>(source.const_data_ptr());
    auto* to = static_cast<char*>(target.mutable_data_ptr());
    const int64_t sequences = static_cast<int64_t>(moves.size());
    const int64_t bytes_per_sequence = std::max<int64_t>(1, moved_rows * row_bytes / std::max<int64_t>(1, sequences));
    const int64_t grain = std::max<int64_t>(1, kBytesPerThread / bytes_per_sequence);
    torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Move& move = moves[b];
        char* start = to + move.target * row_bytes;
        if (move.rows) std::memcpy(start, from + move.source * row_bytes, move.rows * row_bytes);
        std::memset(start + move.rows * row_bytes, 0, move.zeros * row_bytes);
      }
    });
  }
}

void pack_cpu(std::vector<Tensor> tensors, Tensor lengths, std::vector<Tensor> out, Tensor cu_seqlens) {
  STD_TORCH_CHECK(!tensors.empty() && tensors[0].dim() >= 2, "tensors: expected at least one [B, T, ...]");
  const int32_t* length = read_vector(lengths, "lengths");
  read_vector(cu_seqlens, "cu_seqlens");
  const int64_t sequences = lengths.numel(), padded = tensors[0].size(1);
  STD_TORCH_CHECK(cu_seqlens.numel() == sequences + 1, "cu_seqlens: expected [B + 1]");
  auto* bounds = static_cast<int32_t*>(cu_seqlens.mutable_data_ptr());
  std::vector<Move> moves(sequences);
  bounds[0] = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    STD_TORCH_CHECK(
        length[b] >= 0 && length[b] <= padded, "lengths[", b, "]: got ", length[b], ", expected 0 to T = ", padded);
    moves[b] = {b * padded, bounds[b], length[b], 0};
    bounds[b + 1] = bounds[b] + length[b];
  }
  move_all(tensors, 2, out, 1, moves);
}

void unpack_cpu(std::vector<Tensor> tensors, Tensor cu_seqlens, std::vector<Tensor> out) {
  STD_TORCH_CHECK(!tensors.empty() && tensors[0].dim() >= 1, "tensors: expected at least one [N, ...]");
  STD_TORCH_CHECK(!out.empty() && out[0].dim() >= 2, "out: expected at least one [B, T, ...]");
  const int32_t* bounds = read_bounds(cu_seqlens, tensors[0].size(0));
  const int64_t sequences = cu_seqlens.numel() - 1, padded = out[0].size(1);
  std::vector<Move> moves(sequences);
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t rows = bounds[b + 1] - bounds[b];
    STD_TORCH_CHECK(rows <= padded, "max_seqlen: sequence ", b, " has ", rows, " tokens, more than ", padded);
    moves[b] = {bounds[b], b * padded, rows, padded - rows};
  }
  move_all(tensors, 1, out, 2, moves);
}

template <typename Index>
std::vector<Move> survivor_moves(
    const Index* survivors, int64_t live, const int32_t* bounds, int64_t sequences, int32_t* new_bounds) {
  std::vector<Move> moves(live);
  new_bounds[0] = 0;
  for (int64_t k = 0; k < live; ++k) {
    const int64_t b = survivors[k];
    STD_TORCH_CHECK(
        b >= 0 && b < sequences, "survivors[", k, "]: got row ", b, ", expected 0 to ", sequences - 1);
    const int32_t rows = bounds[b + 1] - bounds[b];
    moves[k] = {bounds[b], new_bounds[k], rows, 0};
    new_bounds[k + 1] = new_bounds[k] + rows;
  }
  return moves;
}

void compact_packed_cpu(
    std::vector<Tensor> tensors,
    Tensor cu_seqlens,
    Tensor survivors,
    std::optional<Tensor> count,
    std::vector<Tensor> out,
    Tensor new_cu_seqlens) {
  STD_TORCH_CHECK(!tensors.empty() && tensors[0].dim() >= 1, "tensors: expected at least one [N, ...]");
  const int32_t* bounds = read_bounds(cu_seqlens, tensors[0].size(0));
  const int64_t sequences = cu_seqlens.numel() - 1, capacity = survivors.numel();
  read_vector(new_cu_seqlens, "new_cu_seqlens");
  STD_TORCH_CHECK(new_cu_seqlens.numel() == capacity + 1, "new_cu_seqlens: expected [K + 1]");
  STD_TORCH_CHECK(
      survivors.is_cpu() && survivors.dim() == 1 && survivors.is_contiguous(),
      "survivors: expected a contiguous vector");
  STD_TORCH_CHECK(!count || count->numel() == 1, "count: expected one value");
  int64_t live = capacity;
  if (count) live = std::clamp<int64_t>(*read_vector(*count, "count"), 0, capacity);
  auto* new_bounds = static_cast<int32_t*>(new_cu_seqlens.mutable_data_ptr());
  const bool narrow = survivors.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(narrow || survivors.scalar_type() == ScalarType::Long, "survivors: expected int32 or int64");
  const void* rows = survivors.const_data_ptr();
  const auto moves = narrow
      ? survivor_moves(static_cast<const int32_t*>(rows), live, bounds, sequences, new_bounds)
      : survivor_moves(static_cast<const int64_t*>(rows), live, bounds, sequences, new_bounds);
  std::fill(new_bounds + live + 1, new_bounds + capacity + 1, new_bounds[live]);
  move_all(tensors, 1, out, 1, moves);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) {
  m.impl("pack_", TORCH_BOX(&pack_cpu));
  m.impl("unpack_", TORCH_BOX(&unpack_cpu));
  m.impl("compact_packed_", TORCH_BOX(&compact_packed_cpu));
}

}  // namespace fastkd::packed
