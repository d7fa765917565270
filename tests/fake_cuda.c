// A CUDA driver without a device: loads every module, runs nothing, and remembers the last launch. Pointers are those of
// the host. Only what Triton's launcher and ours call is here.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MOST_FUNCTIONS 4096
#define MOST_PARAMETERS 128

typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
} LaunchConfig;

struct {
  int count, by_triton;
  uint64_t function, stream;
  unsigned grid[3], block[3], shared_bytes, attribute_count, parameters;
  uint64_t values[MOST_PARAMETERS];
} last;

static unsigned parameter_counts[MOST_FUNCTIONS];
static unsigned char parameter_sizes[MOST_FUNCTIONS][MOST_PARAMETERS];
static uint64_t functions;
static int context = 1, launch_error;

// The driver reads the sizes of a kernel's parameters in its machine code; here Python says what PTX says.
void fake_describe(uint64_t function, unsigned count, const unsigned char* sizes) {
  parameter_counts[function] = count;
  memcpy(parameter_sizes[function], sizes, count);
}

void fake_set_context(int current) {
  context = current;
}

void fake_fail(int code) {
  launch_error = code;
}

static int record(
    int by_triton, uint64_t function, const unsigned* grid, const unsigned* block, unsigned shared_bytes, void* stream,
    unsigned attribute_count, void** parameters) {
  last.count++;
  last.by_triton = by_triton;
  last.function = function;
  memcpy(last.grid, grid, sizeof(last.grid));
  memcpy(last.block, block, sizeof(last.block));
  last.shared_bytes = shared_bytes;
  last.stream = (uint64_t)stream;
  last.attribute_count = attribute_count;
  last.parameters = parameter_counts[function];
  for (unsigned index = 0; index < last.parameters; index++) {
    last.values[index] = 0;
    memcpy(&last.values[index], parameters[index], parameter_sizes[function][index]);
  }
  return launch_error;
}

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
  return record(
      1, (uint64_t)function, config->grid, config->block, config->shared_bytes, config->stream,
      config->attribute_count, parameters);
}

int cuLaunchKernel(
    void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra) {
  const unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
  return record(0, (uint64_t)function, grid, block, shared_bytes, stream, 0, parameters);
}

int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
  if (index >= parameter_counts[(uint64_t)function]) return 1;
  *offset = 0;
  *size = parameter_sizes[(uint64_t)function][index];
  return 0;
}

int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)++functions;
  return functions < MOST_FUNCTIONS ? 0 : 2;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = module;
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;            // threads a warp
    case 16: *value = 132; break;           // multiprocessors
    case 12: case 82: *value = 65536; break;  // registers
    case 75: *value = 9; break;             // compute capability
    case 81: case 97: *value = 232448; break;  // shared memory
    default: *value = 0;
  }
  return 0;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : 0;  // threads a block
  return 0;
}

int cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
  memcpy(value, &pointer, sizeof(pointer));
  return 0;
}

int cuCtxGetCurrent(void** current) {
  *current = (void*)(uintptr_t)context;
  return 0;
}

int cuCtxSetCurrent(void* current) {
  context = current != NULL;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** retained, int device) {
  *retained = (void*)1;
  return 0;
}

int cuGetErrorString(int code, const char** text) {
  *text = "an error of the fake driver";
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuCtxGetDevice(int* device) { return *device = 0; }
int cuCtxGetLimit(size_t* value, int limit) { return *value = 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleUnload(void* module) { return 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuStreamIsCapturing(void* stream, int* status) { return *status = 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) { return *clusters = 1; }
int cuTensorMapEncodeTiled(void* map) { return 1; }
