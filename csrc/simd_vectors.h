// Vectors of LANES floats, and how float32 and bfloat16 memory becomes them. Included by the sources that simd_levels.h
// compiles, once per instruction set: hence no include guard.

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

static inline Floats splat(float value) {
  return value - Floats{};
}

static inline Floats load(const float* from) {
  Floats lanes;
  __builtin_memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

static inline void store(float* to, Floats lanes) {
  __builtin_memcpy(to, &lanes, sizeof lanes);
}

static inline Floats load(const Bf16* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

// Rounds to the nearest, ties to even; NaN stays NaN.
static inline void store(Bf16* to, Floats lanes) {
  const Words bits = (Words)lanes;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = lanes == lanes ? rounded : 0x7fc0 + Words{};
  const Halves halves = __builtin_convertvector(rounded, Halves);
  __builtin_memcpy(to, &halves, sizeof halves);
}

static inline float widen(float value) {
  return value;
}

static inline float widen(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float widened;
  __builtin_memcpy(&widened, &bits, sizeof widened);
  return widened;
}

static inline void narrow(float value, float* to) {
  *to = value;
}

static inline void narrow(float value, Bf16* to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  to->bits = value == value ? static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

// a > b ? a : b, and so b where either is NaN: what x86 has an instruction for.
static inline Floats larger(Floats a, Floats b) {
#if FASTKD_X86_LEVELS && LANES == 16
  // GCC 12 takes two instructions without being told, and warns of the unmasked form
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif FASTKD_X86_LEVELS && LANES == 8
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// 2^y for -127 <= y <= 0, where 2^-127 is exactly 0; NaN stays NaN. As 2^n 2^r with n = round(y).
static inline Floats bounded_power_of_two(Floats y) {
  const float to_integer = 12582912.f;  // 1.5 * 2^23: adding it leaves round(y) in the low mantissa bits
  const Floats shifted = y + to_integer;
  const Floats r = y - (shifted - to_integer);
  const Floats r2 = r * r;
  const Floats low = r * 0.24022647738456726f + 0.6931471824645996f;
  const Floats middle = r * 0.00961843691766262f + 0.055503323674201965f;
  const Floats high = r * 0.00015353361959569156f + 0.0013398873852565885f;
  const Floats p = r * (low + r2 * (middle + r2 * high)) + 1.f;
  // n = -127 makes a scale of exactly 0
  return p * (Floats)(((Ints)shifted + 127) << 23);
}

// 2^y for y <= 0, exactly 0 from -127 down; NaN stays NaN.
static inline Floats power_of_two(Floats y) {
  return bounded_power_of_two(larger(splat(-127.f), y));
}

// The lanes a[INDEX], or b[INDEX - LANES] from LANES up; clang and GCC before 12 have no builtin in common.
template <int... INDEX>
static inline Floats shuffle(Floats a, Floats b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, INDEX...);
#else
  return __builtin_shuffle(a, b, Ints{INDEX...});
#endif
}

template <int SPAN, int... LANE>
static inline Floats swapped(Floats lanes, std::integer_sequence<int, LANE...>) {
  return shuffle<(LANE ^ SPAN)...>(lanes, lanes);
}

template <int SPAN>
static inline Floats swapped(Floats lanes) {
  return swapped<SPAN>(lanes, std::make_integer_sequence<int, LANES>());
}

static inline float sum_of(Floats lanes) {
#if LANES >= 16
  lanes += swapped<8>(lanes);
#endif
#if LANES >= 8
  lanes += swapped<4>(lanes);
#endif
  lanes += swapped<2>(lanes);
  return lanes[0] + lanes[1];
}

static inline float largest_of(Floats lanes) {
#if LANES >= 16
  lanes = larger(lanes, swapped<8>(lanes));
#endif
#if LANES >= 8
  lanes = larger(lanes, swapped<4>(lanes));
#endif
  lanes = larger(lanes, swapped<2>(lanes));
  return lanes[0] > lanes[1] ? lanes[0] : lanes[1];
}

// Swaps the blocks of SPAN x SPAN off the diagonal of every 2 SPAN x 2 SPAN block.
template <int SPAN, int... LANE>
static inline void swap_blocks(Floats* rows, std::integer_sequence<int, LANE...>) {
#pragma GCC unroll 16
  for (int row = 0; row < LANES; ++row) {
    if (row & SPAN) continue;
    const Floats a = rows[row], b = rows[row + SPAN];
    rows[row] = shuffle<(LANE & SPAN ? LANES + LANE - SPAN : LANE)...>(a, b);
    rows[row + SPAN] = shuffle<(LANE & SPAN ? LANES + LANE : LANE + SPAN)...>(a, b);
  }
}

template <int SPAN>
static inline void swap_blocks(Floats* rows) {
  swap_blocks<SPAN>(rows, std::make_integer_sequence<int, LANES>());
}

static inline void transpose(Floats* rows) {
#if LANES >= 16
  swap_blocks<8>(rows);
#endif
#if LANES >= 8
  swap_blocks<4>(rows);
#endif
  swap_blocks<2>(rows);
  swap_blocks<1>(rows);
}

// `count` values, which need not be a multiple of LANES, times `scale`; zeros up to the multiple.
template <typename T>
static inline void widen_row(const T* from, int64_t count, float scale, float* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i) * scale);
  if (i == count) return;
  store(to + i, Floats{});
  for (; i < count; ++i) to[i] = widen(from[i]) * scale;
}

template <typename T>
static inline void narrow_row(const float* from, int64_t count, float scale, T* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i) * scale);
  for (; i < count; ++i) narrow(from[i] * scale, to + i);
}

// Rows of `width` floats behind one another.
template <typename T>
static inline void copy_rows(const T* from, int64_t stride, int64_t rows, int64_t width, float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(to + row * width + i, load(from + row * stride + i));
    for (; i < width; ++i) to[row * width + i] = widen(from[row * stride + i]);
  }
}
