// compact on CPU: all rows of all tensors are one range of bytes, shared out evenly between the threads.

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "compact.h"

namespace fastkd::compact {
namespace {

// Below this, waking another thread takes longer than copying.
constexpr int64_t kBytesPerThread = 512 * 1024;

struct Dimension {
  int64_t size;
  int64_t stride;  // bytes
};

// Where the rows of one tensor come from and go to. A row is `outer` dimensions of dense runs; a dense row is one run.
struct RowCopy {
  const char* source;
  char* target;
  int64_t source_stride;  // bytes
  int64_t row_bytes;
  int64_t run_bytes;
  std::vector<Dimension> outer;
  int64_t first_byte;  // of this tensor in the range of all tensors
};

RowCopy describe(const Tensor& source, const Tensor& target, int64_t first_byte) {
  const auto item = static_cast<int64_t>(source.element_size());
  RowCopy copy{
      static_cast<const char*>(source.const_data_ptr()),
      static_cast<char*>(target.mutable_data_ptr()),
      source.stride(0) * item,
      row_numel(source) * item,
      item,
      {},
      first_byte};
  for (int64_t d = source.dim() - 1; d > 0; --d) {
    const Dimension dimension{source.size(d), source.stride(d) * item};
    if (dimension.size == 1) continue;
    if (copy.outer.empty() && dimension.stride == copy.run_bytes) {
      copy.run_bytes *= dimension.size;
      continue;
    }
    copy.outer.insert(copy.outer.begin(), dimension);
  }
  return copy;
}

void copy_dense(const RowCopy& copy, const int64_t* rows, int64_t begin, int64_t end) {
  int64_t k = begin / copy.row_bytes;
  int64_t within = begin % copy.row_bytes;
  while (begin < end) {
    const int64_t bytes = std::min(copy.row_bytes - within, end - begin);
    std::memcpy(copy.target + begin, copy.source + rows[k] * copy.source_stride + within, bytes);
    begin += bytes;
    within = 0;
    ++k;
  }
}

// kRunBytes is known to the compiler for runs of one element, or 0.
template <int64_t kRunBytes>
void copy_runs(const RowCopy& copy, const int64_t* rows, int64_t first_run, int64_t last_run) {
  const int64_t run_bytes = kRunBytes ? kRunBytes : copy.run_bytes;
  const int64_t runs_per_row = copy.row_bytes / run_bytes;
  const Dimension inner = copy.outer.back();
  int64_t run = first_run;
  while (run < last_run) {
    const char* source = copy.source + rows[run / runs_per_row] * copy.source_stride;
    int64_t position = run % runs_per_row;
    int64_t inner_position = 0;
    for (size_t d = copy.outer.size(); d-- > 0;) {
      const int64_t at = position % copy.outer[d].size;
      if (d + 1 == copy.outer.size()) inner_position = at;
      source += at * copy.outer[d].stride;
      position /= copy.outer[d].size;
    }
    const int64_t stop = std::min(last_run, run + inner.size - inner_position);
    for (char* target = copy.target + run * run_bytes; run < stop; ++run, target += run_bytes, source += inner.stride) {
      std::memcpy(target, source, run_bytes);
    }
  }
}

void copy_strided(const RowCopy& copy, const int64_t* rows, int64_t begin, int64_t end) {
  // both neighbours of a cut round it up to the same run, so that no run is split
  const int64_t first_run = (begin + copy.run_bytes - 1) / copy.run_bytes;
  const int64_t last_run = (end + copy.run_bytes - 1) / copy.run_bytes;
  switch (copy.run_bytes) {
    case 1: return copy_runs<1>(copy, rows, first_run, last_run);
    case 2: return copy_runs<2>(copy, rows, first_run, last_run);
    case 4: return copy_runs<4>(copy, rows, first_run, last_run);
    case 8: return copy_runs<8>(copy, rows, first_run, last_run);
    case 16: return copy_runs<16>(copy, rows, first_run, last_run);
    default: return copy_runs<0>(copy, rows, first_run, last_run);
  }
}

template <typename Index>
void read_rows(const Tensor& survivors, int64_t live, int64_t num_rows, int64_t* rows) {
  const auto* index = static_cast<const Index*>(survivors.const_data_ptr());
  const int64_t stride = survivors.stride(0);
  for (int64_t k = 0; k < live; ++k) {
    rows[k] = index[k * stride];
    STD_TORCH_CHECK(
        rows[k] >= 0 && rows[k] < num_rows, "survivors[", k, "]: got row ", rows[k], ", expected 0 to ", num_rows - 1);
  }
}

void compact_out_cpu(
    std::vector<Tensor> tensors,
    Tensor survivors,
    std::optional<Tensor> count,
    std::vector<Tensor> out,
    int64_t /*threads*/,
    bool /*bulk*/) {
  check(tensors, survivors, count, out);
  int64_t live = survivors.size(0);
  if (count) live = std::clamp<int64_t>(*static_cast<const int32_t*>(count->const_data_ptr()), 0, live);

  const std::unique_ptr<int64_t[]> rows(new int64_t[live]);
  const int64_t num_rows = tensors[0].size(0);
  if (survivors.scalar_type() == ScalarType::Int) {
    read_rows<int32_t>(survivors, live, num_rows, rows.get());
  } else {
    read_rows<int64_t>(survivors, live, num_rows, rows.get());
  }

  std::vector<RowCopy> copies;
  copies.reserve(tensors.size());
  int64_t total_bytes = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    copies.push_back(describe(tensors[t], out[t], total_bytes));
    total_bytes += live * copies.back().row_bytes;
  }

  torch::stable::parallel_for(0, total_bytes, kBytesPerThread, [&](int64_t begin, int64_t end) {
    for (const RowCopy& copy : copies) {
      const int64_t from = std::max<int64_t>(begin - copy.first_byte, 0);
      const int64_t to = std::min(end - copy.first_byte, live * copy.row_bytes);
      if (from >= to) continue;
      copy.outer.empty() ? copy_dense(copy, rows.get(), from, to) : copy_strided(copy, rows.get(), from, to);
    }
  });
}

std::vector<Tensor> compact_cpu(
    std::vector<Tensor> tensors, Tensor survivors, std::optional<Tensor> count, int64_t threads, bool bulk) {
  std::vector<Tensor> out = allocate(tensors, capacity_of(survivors));
  compact_out_cpu(std::move(tensors), std::move(survivors), std::move(count), out, threads, bulk);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) {
  m.impl("compact", TORCH_BOX(&compact_cpu));
  m.impl("compact_out", TORCH_BOX(&compact_out_cpu));
}

}  // namespace fastkd::compact
