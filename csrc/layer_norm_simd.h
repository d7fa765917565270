// Layer normalisation of one row that is a sum of rows; compiled once per instruction set by simd_levels.h.
#include "simd_vectors.h"

template <typename T>
static inline Floats sum_at(const void* const* rows, int64_t count, int64_t i) {
  Floats sum = load(static_cast<const T*>(rows[0]) + i);
  for (int64_t r = 1; r < count; ++r) sum += load(static_cast<const T*>(rows[r]) + i);
  return sum;
}

template <typename T>
static void normalise(
    const void* const* rows, int64_t count, const Norm& norm, float* sums, void* total_out, void* out) {
  const int64_t width = norm.width, whole = width - width % LANES;
  Floats total{};
  for (int64_t i = 0; i < whole; i += LANES) {
    const Floats sum = sum_at<T>(rows, count, i);
    store(sums + i, sum);
    total += sum;
  }
  float mean = sum_of(total);
  for (int64_t i = whole; i < width; ++i) {
    sums[i] = 0.f;
    for (int64_t r = 0; r < count; ++r) sums[i] += widen(static_cast<const T*>(rows[r])[i]);
    mean += sums[i];
  }
  mean /= static_cast<float>(width);
  // all of the row is read by now, so that it may be written over
  if (total_out != nullptr) narrow_row(sums, width, 1.f, static_cast<T*>(total_out));

  Floats squares{};
  for (int64_t i = 0; i < whole; i += LANES) {
    const Floats deviation = load(sums + i) - mean;
    squares += deviation * deviation;
  }
  float variance = sum_of(squares);
  for (int64_t i = whole; i < width; ++i) variance += (sums[i] - mean) * (sums[i] - mean);
  const float scale = 1.f / __builtin_sqrtf(variance / static_cast<float>(width) + norm.epsilon);

  const T* weight = static_cast<const T*>(norm.weight);
  const T* bias = static_cast<const T*>(norm.bias);
  T* to = static_cast<T*>(out);
  for (int64_t i = 0; i < whole; i += LANES) {
    const Floats scaled = (load(sums + i) - mean) * scale * load(weight + i);
    store(to + i, bias == nullptr ? scaled : scaled + load(bias + i));
  }
  for (int64_t i = whole; i < width; ++i) {
    const float scaled = (sums[i] - mean) * scale * widen(weight[i]);
    narrow(bias == nullptr ? scaled : scaled + widen(bias[i]), to + i);
  }
}

static const Kernels kKernels{normalise<float>, normalise<Bf16>};
