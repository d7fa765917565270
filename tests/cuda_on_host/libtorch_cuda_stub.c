/* Stands in for libtorch_cuda.so where torch has none: the three functions that csrc/ takes from it. */
#include <stdint.h>

int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = 0;
  return 0;
}

int32_t torch_c10_cuda_check_msg(int32_t code, const char* file, const char* name, uint32_t line, int8_t device, char** message) {
  *message = 0;
  return 0;
}

void torch_c10_cuda_free_error_msg(char* message) {}
