#include "universal_kd_rows.h"

namespace fastkd::distillation {

template void universal_rows(const UniversalCall&, Samples, UniversalWorkspace<float>&, float*);

}  // namespace fastkd::distillation
