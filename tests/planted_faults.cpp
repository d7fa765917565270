// Faults on purpose, one a function: what shows that a build with sanitizers would see them in csrc.
#include <climits>
#include <cstddef>
#include <vector>

extern "C" __attribute__((visibility("default"))) int write_behind_the_end(int count) {
  std::vector<float> row(static_cast<std::size_t>(count));
  float* values = row.data();
  for (int i = 0; i <= count; ++i) values[i] = static_cast<float>(i);
  return static_cast<int>(values[count - 1]);
}

extern "C" __attribute__((visibility("default"))) int overflow(int count) { return INT_MAX - 1 + count; }

static volatile int shared = 0;

extern "C" __attribute__((visibility("default"))) int race(int) {
  for (int i = 0; i < 20000000; ++i) shared = shared + 1;
  return shared;
}
