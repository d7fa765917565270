#define FASTKD_VALUE Pack
#include "distillation_rows.h"

namespace fastkd::distillation {

RowKernels packed_kernels() { return kernels; }

}  // namespace fastkd::distillation
