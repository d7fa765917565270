// The kernels of encoder_layer_simd.h for AVX-512.
#define LEVEL avx512
#define NAME "AVX-512"
#define LANES 16
#if defined(__clang__)
#define TARGETS "avx512f,avx512dq,avx512vl,avx512bw,fma"
#else
// GCC would otherwise take half of a vector
#define TARGETS "avx512f,avx512dq,avx512vl,avx512bw,fma,prefer-vector-width=512"
#endif
#include "encoder_layer_level.h"
