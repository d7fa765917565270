// The kernels of encoder_layer_simd.h for AVX2.
#define LEVEL avx2
#define NAME "AVX2"
#define LANES 8
#define TARGETS "avx2,fma"
#include "encoder_layer_level.h"
