// Memory: where tensors lie, which an op that writes into given ones must know before it starts, and room between steps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "stable_compat.h"

namespace fastkd {

// Bytes from the first element to the end of the last one; 0 for an empty tensor.
template <typename Tensor>
int64_t extent_in_bytes(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) == 0) return 0;
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return (last + 1) * static_cast<int64_t>(tensor.element_size());
}

// Whether their ranges of addresses meet.
template <typename Tensor>
bool overlap(const Tensor& one, const Tensor& other) {
  const auto* first = static_cast<const char*>(one.const_data_ptr());
  const auto* second = static_cast<const char*>(other.const_data_ptr());
  return first < second + extent_in_bytes(other) && second < first + extent_in_bytes(one);
}

template <typename Tensor = torch::stable::Tensor>
void check_no_overlap(const std::vector<Tensor>& inputs, const std::vector<Tensor>& out) {
  for (size_t t = 0; t < out.size(); ++t) {
    for (const Tensor& input : inputs) STD_TORCH_CHECK(!overlap(out[t], input), "out: it overlaps an input");
    for (size_t u = 0; u < t; ++u) STD_TORCH_CHECK(!overlap(out[t], out[u]), "out: two of its tensors overlap");
  }
}

// Grows and stays, one for each thread: fresh megabytes for every call would cost more than the call.
class Arena {
 public:
  char* take(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      // with room, so that lengths which rise one by one do not each pay for new pages
      size_ = (std::max(bytes, size_ + size_ / 2) + kPage - 1) / kPage * kPage;
      memory_ = static_cast<char*>(std::aligned_alloc(kPage, size_));
      if (memory_ == nullptr) {
        const int64_t wanted = size_;
        size_ = 0;
        STD_TORCH_CHECK(
            false, "hidden_states: out of memory, could not allocate ", wanted, " bytes for intermediate values");
      }
    }
    return memory_;
  }
  ~Arena() {
    std::free(memory_);
  }

 private:
  static constexpr int64_t kPage = 4096;
  char* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace fastkd
