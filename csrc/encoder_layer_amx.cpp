// The kernels of encoder_layer_simd.h for AMX.
#define LEVEL amx
#define NAME "AMX"
#define LANES 16
#define HAS_VNNI 1
#define HAS_BF16 1
#define HAS_AMX 1
#if defined(__clang__)
#define TARGETS "avx512f,avx512dq,avx512vl,avx512bw,fma,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8"
#else
// GCC would otherwise take half of a vector
#define TARGETS "avx512f,avx512dq,avx512vl,avx512bw,fma,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8,prefer-vector-width=512"
#endif
#include "encoder_layer_level.h"
