// Runs the kernels of csrc/compact_kernels.cuh on the host: every block and every thread, one after the other.
#include "compact_kernels.cuh"

struct HostTensor {
  const char* source;
  char* target;
  int64_t source_stride;
  int64_t row_bytes;
};

extern "C" void compact_on_host(
    const HostTensor* tensors, int num_tensors, const void* survivors, int index_bytes, const int32_t* count,
    int64_t capacity, int64_t num_rows, int threads, bool bulk) {
  using namespace fastkd::compact;
  Launch launch{};
  launch.survivors = survivors;
  launch.survivors_stride = 1;
  launch.count = count;
  launch.capacity = capacity;
  launch.num_rows = num_rows;
  int64_t tiles = 0;
  for (int t = 0; t < num_tensors; ++t) {
    RowCopy copy{};
    copy.source = tensors[t].source;
    copy.target = tensors[t].target;
    copy.source_stride = tensors[t].source_stride;
    copy.row_bytes = tensors[t].row_bytes;
    tiles = append(launch, copy, tiles, threads, bulk);
  }
  const auto narrow = bulk ? compact_bulk<int32_t> : compact_vector<int32_t>;
  const auto wide = bulk ? compact_bulk<int64_t> : compact_vector<int64_t>;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < tiles; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) (index_bytes == 4 ? narrow : wide)(launch);
  }
}
