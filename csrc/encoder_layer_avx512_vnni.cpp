// The kernels of encoder_layer_simd.h for AVX-512 with dot products of 8-bit integers.
#define LEVEL avx512_vnni
#define NAME "AVX512-VNNI"
#define LANES 16
#define HAS_VNNI 1
#if defined(__clang__)
#define TARGETS "avx512f,avx512dq,avx512vl,avx512bw,fma,avx512vnni"
#else
// GCC would otherwise take half of a vector
#define TARGETS "avx512f,avx512dq,avx512vl,avx512bw,fma,avx512vnni,prefer-vector-width=512"
#endif
#include "encoder_layer_level.h"
