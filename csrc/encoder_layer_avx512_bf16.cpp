// The kernels of encoder_layer_simd.h for AVX-512 with dot products of bfloat16 too.
#define LEVEL avx512_bf16
#define NAME "AVX512-BF16"
#define LANES 16
#define HAS_VNNI 1
#define HAS_BF16 1
#if defined(__clang__)
#define TARGETS "avx512f,avx512dq,avx512vl,avx512bw,fma,avx512vnni,avx512bf16"
#else
// GCC would otherwise take half of a vector
#define TARGETS "avx512f,avx512dq,avx512vl,avx512bw,fma,avx512vnni,avx512bf16,prefer-vector-width=512"
#endif
#include "encoder_layer_level.h"
