#define FASTKD_VALUE double
#include "distillation_rows.h"

namespace fastkd::distillation {

RowKernels double_kernels() { return kernels; }

}  // namespace fastkd::distillation
