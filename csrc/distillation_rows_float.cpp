#define FASTKD_VALUE float
#include "distillation_rows.h"

namespace fastkd::distillation {

RowKernels float_kernels() { return kernels; }

}  // namespace fastkd::distillation
