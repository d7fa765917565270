// compact on CUDA: one launch for all tensors of a call, sized for every survivor there could be; the blocks read on the
// device how many there are. Two ways to move a row: 16-byte accesses through registers, or 1-D bulk copies (TMA)
// through shared memory on sm_90 and later.

#include <cuda_runtime.h>

#include <utility>

#include "compact.h"
#include "compact_kernels.cuh"

namespace fastkd::compact {
namespace {

template <typename Index>
void start(const Launch& launch, int64_t tiles, int threads, bool bulk, cudaStream_t stream) {
  STD_TORCH_CHECK(tiles <= INT32_MAX, "tensors: ", tiles, " tiles are too many for one launch; compact them in parts");
  const auto kernel = bulk ? compact_bulk<Index> : compact_vector<Index>;
  kernel<<<static_cast<unsigned>(tiles), threads, 0, stream>>>(launch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Whether the code that this GPU runs has the bulk copies in it: asking the GPU is not enough, because it may run code
// that was compiled for an older one.
template <typename Index>
bool compiled_with_bulk() {
  cudaFuncAttributes attributes{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, compact_bulk<Index>));
  return attributes.ptxVersion >= 90;
}

void compact_out_cuda(
    std::vector<Tensor> tensors,
    Tensor survivors,
    std::optional<Tensor> count,
    std::vector<Tensor> out,
    int64_t threads,
    bool bulk) {
  check(tensors, survivors, count, out);
  STD_TORCH_CHECK(
      threads >= 32 && threads <= 1024 && (threads & (threads - 1)) == 0, "threads: got ", threads,
      ", expected a power of two from 32 to 1024");
  const int device = survivors.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const bool narrow_index = survivors.scalar_type() == ScalarType::Int;
  bulk = bulk && (narrow_index ? compiled_with_bulk<int32_t>() : compiled_with_bulk<int64_t>());

  // rows with gaps inside are made dense first; the copies have to live until they are enqueued
  std::vector<Tensor> dense;
  dense.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    dense.push_back(has_dense_rows(tensor) ? tensor : torch::stable::contiguous(tensor));
  }

  for (size_t first = 0; first < tensors.size(); first += kMaxTensors) {
    Launch launch{};
    launch.survivors = survivors.const_data_ptr();
    launch.survivors_stride = survivors.stride(0);
    launch.count = count ? static_cast<const int32_t*>(count->const_data_ptr()) : nullptr;
    launch.capacity = survivors.size(0);
    launch.num_rows = tensors[0].size(0);
    int64_t tiles = 0;
    for (size_t t = first; t < std::min(first + kMaxTensors, tensors.size()); ++t) {
      const auto item = static_cast<int64_t>(dense[t].element_size());
      RowCopy copy{};
      copy.source = static_cast<const char*>(dense[t].const_data_ptr());
      copy.target = static_cast<char*>(out[t].mutable_data_ptr());
      copy.source_stride = dense[t].stride(0) * item;
      copy.row_bytes = row_numel(dense[t]) * item;
      tiles = append(launch, copy, tiles, static_cast<int>(threads), bulk);
    }
    if (tiles == 0) continue;
    const auto run = narrow_index ? start<int32_t> : start<int64_t>;
    run(launch, tiles, static_cast<int>(threads), bulk, static_cast<cudaStream_t>(stream));
  }
}

std::vector<Tensor> compact_cuda(
    std::vector<Tensor> tensors, Tensor survivors, std::optional<Tensor> count, int64_t threads, bool bulk) {
  std::vector<Tensor> out = allocate(tensors, capacity_of(survivors));
  compact_out_cuda(std::move(tensors), std::move(survivors), std::move(count), out, threads, bulk);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CUDA, m) {
  m.impl("compact", TORCH_BOX(&compact_cuda));
  m.impl("compact_out", TORCH_BOX(&compact_out_cuda));
}

}  // namespace fastkd::compact
