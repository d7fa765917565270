// The kernels of encoder_layer_simd.h for any CPU.
#define LEVEL baseline
#define NAME name_of(InstructionSet::kBaseline)
#define LANES 4
#include "encoder_layer_level.h"
