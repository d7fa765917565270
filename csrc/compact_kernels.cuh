// The kernels of compact_cuda.cu and how their work is cut into tiles. Nothing here needs torch, so that a test can run
// the very same code on the host, block by block.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cuda/ptx>

namespace fastkd::compact {
namespace {

constexpr int kMaxTensors = 8;         // of one launch; more take another
constexpr int kAccessesPerThread = 4;  // loads in flight before the first store
constexpr int kBulkStages = 4;
constexpr int kBulkStageBytes = 4096;
constexpr int kBulkTileBytes = kBulkStages * kBulkStageBytes;

// One tensor of a launch. A tile is the part of the target that one block copies: `rows_per_tile` rows of one chunk.
struct RowCopy {
  const char* source;
  char* target;
  int64_t source_stride;  // bytes
  int64_t row_bytes;
  uint32_t first_tile;
  uint32_t chunks_per_row;
  int32_t lanes_log2;    // threads that share a row
  int32_t access_bytes;  // 16, 4 or 1: what source, target and rows are all aligned to
  bool bulk;
};

struct Launch {
  RowCopy copies[kMaxTensors];
  int32_t num_copies;
  const void* survivors;
  int64_t survivors_stride;
  const int32_t* count;  // null: all
  int64_t capacity;
  int64_t num_rows;
};

// A block's share of the work; `row` is negative where there is nothing to copy.
struct Tile {
  int64_t position;
  int64_t row;
  uint32_t chunk;
};

template <typename Index>
__device__ Tile locate(const Launch& launch, const RowCopy& copy, int row_in_tile) {
  const uint32_t tile = blockIdx.x - copy.first_tile;
  const uint32_t group = tile / copy.chunks_per_row;
  const uint32_t chunk = tile - group * copy.chunks_per_row;
  const uint32_t rows_per_tile = copy.bulk ? 1 : blockDim.x >> copy.lanes_log2;
  const int64_t position = static_cast<int64_t>(group) * rows_per_tile + row_in_tile;
  int64_t live = launch.capacity;
  if (launch.count != nullptr) live = min(live, static_cast<int64_t>(*launch.count));
  if (position >= live) return {position, -1, chunk};
  const int64_t row = static_cast<const Index*>(launch.survivors)[position * launch.survivors_stride];
  return {position, row < launch.num_rows ? row : -1, chunk};
}

template <typename Access>
__device__ void copy_lanes(const RowCopy& copy, const Tile& tile, int lane) {
  const int lanes = 1 << copy.lanes_log2;
  const int64_t accesses = copy.row_bytes / static_cast<int64_t>(sizeof(Access));
  const int64_t first = static_cast<int64_t>(tile.chunk) * lanes * kAccessesPerThread + lane;
  const auto* __restrict__ source = reinterpret_cast<const Access*>(copy.source + tile.row * copy.source_stride);
  auto* __restrict__ target = reinterpret_cast<Access*>(copy.target + tile.position * copy.row_bytes);
  Access held[kAccessesPerThread];
#pragma unroll
  for (int i = 0; i < kAccessesPerThread; ++i) {
    const int64_t at = first + i * lanes;
    if (at < accesses) held[i] = __ldg(source + at);
  }
#pragma unroll
  for (int i = 0; i < kAccessesPerThread; ++i) {
    const int64_t at = first + i * lanes;
    if (at < accesses) target[at] = held[i];
  }
}

template <typename Index>
__device__ void copy_tile(const Launch& launch, const RowCopy& copy) {
  const int lane = threadIdx.x & ((1 << copy.lanes_log2) - 1);
  const Tile tile = locate<Index>(launch, copy, threadIdx.x >> copy.lanes_log2);
  if (tile.row < 0) return;
  switch (copy.access_bytes) {
    case 16: return copy_lanes<uint4>(copy, tile, lane);
    case 4: return copy_lanes<uint32_t>(copy, tile, lane);
    default: return copy_lanes<uint8_t>(copy, tile, lane);
  }
}

__device__ const RowCopy& copy_of_block(const Launch& launch) {
  int number = 0;
  while (number + 1 < launch.num_copies && blockIdx.x >= launch.copies[number + 1].first_tile) ++number;
  return launch.copies[number];
}

template <typename Index>
__global__ void __launch_bounds__(1024) compact_vector(const __grid_constant__ Launch launch) {
  copy_tile<Index>(launch, copy_of_block(launch));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// One thread keeps kBulkStages loads in flight and sends each stage on as it lands.
template <typename Index>
__device__ void copy_tile_in_bulk(const Launch& launch, const RowCopy& copy) {
  namespace ptx = cuda::ptx;
  alignas(128) __shared__ char stages[kBulkStages][kBulkStageBytes];
  __shared__ uint64_t landed[kBulkStages];
  if (threadIdx.x != 0) return;
  const Tile tile = locate<Index>(launch, copy, 0);
  if (tile.row < 0) return;

  const int64_t begin = static_cast<int64_t>(tile.chunk) * kBulkTileBytes;
  const int64_t bytes = min(copy.row_bytes - begin, static_cast<int64_t>(kBulkTileBytes));
  const char* source = copy.source + tile.row * copy.source_stride + begin;
  char* target = copy.target + tile.position * copy.row_bytes + begin;
#pragma unroll
  for (int stage = 0; stage < kBulkStages; ++stage) ptx::mbarrier_init(&landed[stage], 1);
  ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);

#pragma unroll
  for (int stage = 0; stage < kBulkStages; ++stage) {
    const int64_t from = stage * kBulkStageBytes;
    if (from >= bytes) break;
    const auto size = static_cast<uint32_t>(min(bytes - from, static_cast<int64_t>(kBulkStageBytes)));
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &landed[stage], size);
    ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, stages[stage], source + from, size, &landed[stage]);
  }
#pragma unroll
  for (int stage = 0; stage < kBulkStages; ++stage) {
    const int64_t from = stage * kBulkStageBytes;
    if (from >= bytes) break;
    const auto size = static_cast<uint32_t>(min(bytes - from, static_cast<int64_t>(kBulkStageBytes)));
    while (!ptx::mbarrier_try_wait_parity(&landed[stage], 0)) {
    }
    ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, target + from, stages[stage], size);
    ptx::cp_async_bulk_commit_group();
  }
  // shared memory must outlive the reads of the last stores
  ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>{});
}
#endif

template <typename Index>
__global__ void __launch_bounds__(1024) compact_bulk(const __grid_constant__ Launch launch) {
  const RowCopy& copy = copy_of_block(launch);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (copy.bulk) return copy_tile_in_bulk<Index>(launch, copy);
#endif
  copy_tile<Index>(launch, copy);
}

int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

int32_t access_bytes(const RowCopy& copy) {
  const auto bits = reinterpret_cast<uintptr_t>(copy.source) | reinterpret_cast<uintptr_t>(copy.target) |
      static_cast<uintptr_t>(copy.source_stride) | static_cast<uintptr_t>(copy.row_bytes);
  if (bits % 16 == 0) return 16;
  return bits % 4 == 0 ? 4 : 1;
}

// Cuts the target of one tensor into tiles; returns how many there are.
int64_t cut_into_tiles(RowCopy& copy, int64_t capacity, int threads, bool bulk) {
  copy.access_bytes = access_bytes(copy);
  copy.bulk = bulk && copy.access_bytes == 16;
  if (copy.bulk) {
    copy.chunks_per_row = static_cast<uint32_t>(ceil_div(copy.row_bytes, kBulkTileBytes));
    return capacity * copy.chunks_per_row;
  }
  const int64_t accesses = copy.row_bytes / copy.access_bytes;
  copy.lanes_log2 = 0;
  while ((1 << copy.lanes_log2) < threads && (int64_t{kAccessesPerThread} << copy.lanes_log2) < accesses) {
    ++copy.lanes_log2;
  }
  copy.chunks_per_row = static_cast<uint32_t>(ceil_div(accesses, int64_t{kAccessesPerThread} << copy.lanes_log2));
  return ceil_div(capacity, threads >> copy.lanes_log2) * copy.chunks_per_row;
}

// Adds one tensor to a launch that has `tiles` so far; returns the new number of tiles.
int64_t append(Launch& launch, RowCopy copy, int64_t tiles, int threads, bool bulk) {
  if (copy.row_bytes == 0 || launch.capacity == 0 || launch.num_rows == 0) return tiles;
  copy.first_tile = static_cast<uint32_t>(tiles);
  tiles += cut_into_tiles(copy, launch.capacity, threads, bulk);
  launch.copies[launch.num_copies++] = copy;
  return tiles;
}

}  // namespace
}  // namespace fastkd::compact
