// Products, row work and attention of an encoder layer; compiled once per instruction set by encoder_layer_level.h.
#include "simd_vectors.h"

constexpr int kVectors = kPanel / LANES;  // in a line of a panel

// ---- activations

// 2^y for y <= 0, NaN where y is NaN; the coarse one to 3e-6, far inside a bfloat16.
template <bool PRECISE>
static inline Floats decay(Floats y) {
#if FASTKD_X86_LEVELS && LANES == 16
  if (PRECISE) {
    const Floats r = _mm512_maskz_reduce_ps(0xffff, y, 8);  // y - round(y)
    Floats p = r * 0.00015345742576755583f + 0.0013399928575381637f;
    p = p * r + 0.009618489071726799f;
    p = p * r + 0.05550328642129898f;
    p = p * r + 0.24022646248340607f;
    p = p * r + 0.6931471824645996f;
    return _mm512_maskz_scalef_ps(0xffff, p * r + 1.f, y - r);
  }
  const Floats r = _mm512_maskz_reduce_ps(0xffff, y, 9);  // y - floor(y)
  Floats p = r * 0.01353409606963396f + 0.052011605352163315f;
  p = p * r + 0.24144266545772552f;
  p = p * r + 0.6930038332939148f;
  return _mm512_maskz_scalef_ps(0xffff, p * r + 1.0000026226043701f, y);
#else
  return power_of_two(y);
#endif
}

static inline Floats size_of(Floats x) {
  const Floats negative = -x;
  return larger(x, negative);
}

// x Phi(x) = max(x, 0) - |x| 2^(p(|x|) - 1), where 2^p(|x|) = erfc(|x| / sqrt 2); the polynomial p is fitted to at most
// 4e-8 of error in the result (6e-7 for bfloat16).
template <bool PRECISE>
static inline Floats gelu(Floats x) {
  const Floats size = size_of(x);
  const Floats t = size < 20.f ? size : splat(20.f);  // beyond, and for NaN, the first term is all
  Floats p;
  if (PRECISE) {
    p = t * -1.9020279751202906e-06f + 2.8056438168277964e-05f;
    p = p * t - 0.0001314705441473052f;
    p = p * t - 0.00027208306710235775f;
    p = p * t + 0.007245432119816542f;
    p = p * t - 0.05262761935591698f;
    p = p * t - 0.4591621458530426f;
    p = p * t - 1.1511110067367554f;
  } else {
    p = t * -0.0004881023778580129f + 0.007198719307780266f;
    p = p * t - 0.052146632224321365f;
    p = p * t - 0.45959585905075073f;
    p = p * t - 1.1510004997253418f;
  }
  return larger(Floats{}, x) - t * decay<PRECISE>(p * t - 1.f);
}

// x / (1 + exp(-y))
template <bool PRECISE>
static inline Floats times_sigmoid(Floats x, Floats y) {
  const Floats small = decay<PRECISE>(size_of(y) * -1.4426950408889634f);
  const Floats one = splat(1.f);
  return x * (y < 0.f ? small : one) / (one + small);
}

// (1 - d) / (1 + d) of |x|, with d = exp(-2 |x|)
template <bool PRECISE>
static inline Floats tanh_of(Floats x) {
  const Floats small = decay<PRECISE>(size_of(x) * -2.8853900817779268f);
  const Floats one = splat(1.f);
  const Floats result = (one - small) / (one + small);
  return x < 0.f ? -result : result;
}

template <bool PRECISE>
static inline Floats activate(Activation activation, Floats x) {
  switch (activation) {
    case kGelu: return gelu<PRECISE>(x);
    case kTanhGelu: return times_sigmoid<PRECISE>(x, x * (1.5957691216057308f + 0.07135481282553487f * (x * x)));
    case kRelu: return larger(Floats{}, x);
    case kSilu: return times_sigmoid<PRECISE>(x, x);
    case kTanh: return tanh_of<PRECISE>(x);
    default: return x;
  }
}

// ---- where a product goes

static inline void store_bf16(char* to, Floats lanes) {
#if HAS_BF16
  const auto halves = _mm512_cvtneps_pbh(lanes);
  __builtin_memcpy(to, &halves, sizeof halves);
#else
  store(reinterpret_cast<Bf16*>(to), lanes);
#endif
}

// Else a product would be added to before it is rounded in one copy of a loop and after it in another, and an answer would
// depend on which columns a thread has.
static inline void keep_rounded(Floats& product) {
#if defined(__x86_64__)
  __asm__("" : "+v"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#else
  (void)product;
#endif
}

template <int COUNT>
struct Count {
  static constexpr int value = COUNT;
};

// Sums of a block of a product: float32 or int32 rows of `panels` panels, of which the first is `panel` of the weight.
struct Block {
  const char* sums;
  int64_t stride;  // bytes
  int64_t first_row, rows;
  int64_t panel, panels;
};

// An activation that is known when a product is compiled, or kAny.
constexpr Activation kAny = kActivations;

template <Activation ACTIVATION, bool PRECISE>
static inline Floats activate_as(Activation activation, Floats x) {
  return activate<PRECISE>(ACTIVATION == kAny ? activation : ACTIVATION, x);
}

// Rows `from` to `end` of a block. Everything that a store might change for the compiler is copied first.
template <bool INTEGERS, Sink SINK, bool NARROW, bool GATED, Activation ACTIVATION>
static void finish_as(const Product& product, const Block& block, int64_t from, int64_t end) {
  constexpr int64_t kStep = GATED ? 2 : 1;
  constexpr int64_t kSize = NARROW ? 2 : 4;
  constexpr int kAtOnce = GATED ? 1 : 2;  // panels, whose activations do not wait for each other
  const Activation activation = product.activation;
  const int64_t panels = block.panels, stride = block.stride, out_stride = product.out_stride;
  const int64_t column = block.panel / kStep * kPanel * kSize;  // bytes
  const char* const all_sums = block.sums;
  const float* const bias = product.weight->bias == nullptr ? nullptr : product.weight->bias + block.panel * kPanel;
  const float* const scales = INTEGERS ? product.weight->scales + block.panel * kPanel : nullptr;
  for (int64_t row = from; row < end; ++row) {
    const char* const sums = all_sums + row * stride;
    const int64_t at_row = block.first_row + row;
    const float row_scale = INTEGERS ? product.row_scales[at_row] : 1.f;
    const auto columns = [&](int64_t i) {
      Floats result;
      if (INTEGERS) {
        Ints whole;
        __builtin_memcpy(&whole, sums + i * 4, sizeof whole);
        result = __builtin_convertvector(whole, Floats) * (load(scales + i) * row_scale);
        keep_rounded(result);
      } else {
        result = load(reinterpret_cast<const float*>(sums) + i);
      }
      return bias == nullptr ? result : result + load(bias + i);
    };
    char* const out = SINK == Sink::kTiles ? product.out + at_row / kBlock * out_stride * kTile + at_row % kBlock * kLine
                                           : product.out + at_row * out_stride;
    const auto write = [&](int64_t i, Floats result) {
      const int64_t byte = column + i * kSize;
      char* to = SINK == Sink::kTiles ? out + byte / kLine * kTile + byte % kLine : out + byte;
      if (NARROW) {
        store_bf16(to, result);
      } else if (SINK == Sink::kSums) {
        store(reinterpret_cast<float*>(to), load(reinterpret_cast<float*>(to)) + result);
      } else {
        store(reinterpret_cast<float*>(to), result);
      }
    };
    const auto some = [&](int64_t panel, auto count) {
      constexpr int kCount = decltype(count)::value * kVectors;
      Floats results[kCount];
      for (int n = 0; n < kCount; ++n) results[n] = columns(panel * kPanel + n * LANES);
      for (int n = 0; n < kCount; ++n) results[n] = activate_as<ACTIVATION, !NARROW>(activation, results[n]);
      for (int n = 0; n < kCount; ++n) {
        if (GATED) results[n] *= columns((panel + 1) * kPanel + n * LANES);
        write(panel / kStep * kPanel + n * LANES, results[n]);
      }
    };
    int64_t panel = 0;
    for (; panel + kAtOnce * kStep <= panels; panel += kAtOnce * kStep) some(panel, Count<kAtOnce>{});
    for (; panel < panels; panel += kStep) some(panel, Count<1>{});
  }
}

using Finish = void (*)(const Product&, const Block&, int64_t from, int64_t end);

template <bool INTEGERS, Sink SINK, bool NARROW>
static Finish finish_with(const Product& product) {
  if (product.gated) return finish_as<INTEGERS, SINK, NARROW, true, kAny>;
  switch (product.activation) {
    case kNone: return finish_as<INTEGERS, SINK, NARROW, false, kNone>;
    case kGelu: return finish_as<INTEGERS, SINK, NARROW, false, kGelu>;
    default: return finish_as<INTEGERS, SINK, NARROW, false, kAny>;
  }
}

template <bool INTEGERS>
static Finish finish_of(const Product& product) {
  const bool narrow = product.out_number == kBFloat16;
  if (product.sink == Sink::kSums) return finish_as<INTEGERS, Sink::kSums, false, false, kNone>;
  if (product.sink == Sink::kRows) {
    return narrow ? finish_with<INTEGERS, Sink::kRows, true>(product) : finish_with<INTEGERS, Sink::kRows, false>(product);
  }
  return narrow ? finish_with<INTEGERS, Sink::kTiles, true>(product) : finish_with<INTEGERS, Sink::kTiles, false>(product);
}

// ---- products by vectors

#if LANES == 16
constexpr int kRows = 8, kPanels = 3;  // 24 vectors of sums of 32 registers
#elif LANES == 8
constexpr int kRows = 4, kPanels = 1;  // 8 of 16
#else
constexpr int kRows = 2, kPanels = 1;
#endif

template <Number NUMBER>
struct Terms {
  using Sums = Ints;
};
template <>
struct Terms<kFloat32> {
  using Sums = Floats;
};
template <>
struct Terms<kBFloat16> {
  using Sums = Floats;
};

static inline Ints splat_bits(const char* from) {
  int32_t bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return bits - Ints{};
}

typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

// Pairs of products of 16-bit integers, added.
static inline Ints multiply_pairs(Shorts a, Shorts b) {
#if defined(__x86_64__) && LANES == 16
  return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__x86_64__) && LANES == 8
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const Ints low_a = ((Ints)a << 16) >> 16, low_b = ((Ints)b << 16) >> 16;
  return low_a * low_b + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

// sums += the 4 bytes of a row times a vector of the panel
static inline void add_terms(Floats& sums, Floats row, Floats line) {
  sums += row * line;
}

#if HAS_BF16
static inline void add_pairs(Floats& sums, Ints row, Ints line) {
  sums = _mm512_dpbf16_ps(sums, (__m512bh)line, (__m512bh)row);
}
#endif

static inline void add_quads(Ints& sums, Ints row, Ints line) {
#if HAS_VNNI
  sums = (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)row, (__m512i)line);
#else
  // numbers of odd and of even place, with their signs
  const Shorts odd = (Shorts)line >> 8, row_odd = (Shorts)row >> 8;
  const Shorts even = (Shorts)((Shorts)line << 8) >> 8, row_even = (Shorts)((Shorts)row << 8) >> 8;
  sums += multiply_pairs(odd, row_odd) + multiply_pairs(even, row_even);
#endif
}

// Bytes that are asked for while a block is multiplied: each pass over the rows asks for its part of the next panels.
struct Ahead {
  const char* from;
  int64_t bytes;
};

template <Number NUMBER, int ROWS, int PANELS>
static inline void multiply_block(
    const char* rows, const char* panels, int64_t panel_bytes, int64_t lines, Ahead ahead, char* to, int64_t stride) {
  using Sums = typename Terms<NUMBER>::Sums;
  Sums sums[ROWS][PANELS * kVectors] = {};
  const int64_t step = round_up(ahead.bytes / (lines / 16), kLine);
  int64_t asked = 0;
  for (int64_t tile = 0; tile < lines / 16; ++tile) {
    const int64_t due = asked + step < ahead.bytes ? asked + step : ahead.bytes;
    for (; asked < due; asked += kLine) __builtin_prefetch(ahead.from + asked, 0, 2);
#pragma GCC unroll 4
    for (int64_t k = 0; k < 16; ++k) {
      const char* line = panels + (tile * 16 + k) * kLine;
      Sums vectors[PANELS * kVectors];
      for (int p = 0; p < PANELS; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          __builtin_memcpy(&vectors[p * kVectors + v], line + p * panel_bytes + v * LANES * 4, sizeof(Sums));
        }
      }
      for (int row = 0; row < ROWS; ++row) {
        const char* at = rows + tile * kTile + row * kLine + k * 4;
        if constexpr (NUMBER == kFloat32) {
          const Floats factor = splat(*reinterpret_cast<const float*>(at));
          for (int n = 0; n < PANELS * kVectors; ++n) add_terms(sums[row][n], factor, vectors[n]);
        } else if constexpr (NUMBER == kInt8) {
          const Ints factor = splat_bits(at);
          for (int n = 0; n < PANELS * kVectors; ++n) add_quads(sums[row][n], factor, vectors[n]);
        } else {
#if HAS_BF16
          const Ints factor = splat_bits(at);
          for (int n = 0; n < PANELS * kVectors; ++n) add_pairs(sums[row][n], factor, (Ints)vectors[n]);
#endif
        }
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int n = 0; n < PANELS * kVectors; ++n) {
      __builtin_memcpy(to + row * stride + n * LANES * 4, &sums[row][n], sizeof(Sums));
    }
  }
}

// Rows `first` to `first + rows` of one tile, at most kRows of them.
template <Number NUMBER, int PANELS>
static inline void multiply_rows_of_tile(
    const Product& product, Finish finish, int64_t first, int64_t rows, int64_t panel, Ahead ahead, char* scratch) {
  const Weight& weight = *product.weight;
  const int64_t panel_bytes = weight.lines * kLine;
  const char* from = product.rows + first / kBlock * (weight.lines / 16) * kTile + first % kBlock * kLine;
  const char* panels = weight.panels + panel * panel_bytes;
  constexpr int64_t stride = PANELS * kLine;
  int64_t done = 0;
  if (kRows == 8 && rows == 8) {
    multiply_block<NUMBER, kRows, PANELS>(from, panels, panel_bytes, weight.lines, ahead, scratch, stride);
    done = kRows;
  }
  if (rows - done >= 4 && kRows >= 4) {
    multiply_block<NUMBER, kRows >= 4 ? 4 : 1, PANELS>(
        from + done * kLine, panels, panel_bytes, weight.lines, ahead, scratch + done * stride, stride);
    done += 4;
  }
  if (rows - done >= 2) {
    multiply_block<NUMBER, 2, PANELS>(
        from + done * kLine, panels, panel_bytes, weight.lines, ahead, scratch + done * stride, stride);
    done += 2;
  }
  if (rows - done >= 1) {
    multiply_block<NUMBER, 1, PANELS>(
        from + done * kLine, panels, panel_bytes, weight.lines, ahead, scratch + done * stride, stride);
  }
#if HAS_VNNI
  if (NUMBER == kInt8) {
    // rows were made unsigned by adding 128
    for (int64_t row = 0; row < rows; ++row) {
      for (int p = 0; p < PANELS; ++p) {
        Ints sums, excess;
        __builtin_memcpy(&sums, scratch + row * stride + p * kLine, sizeof sums);
        __builtin_memcpy(&excess, weight.sums + (panel + p) * kPanel, sizeof excess);
        sums -= excess * 128;
        __builtin_memcpy(scratch + row * stride + p * kLine, &sums, sizeof sums);
      }
    }
  }
#endif
  const Block block{scratch, stride, first, rows, panel, PANELS};
  finish(product, block, 0, rows);
}

template <Number NUMBER>
static void multiply_by_vectors(const Product& product, int64_t first_panel, int64_t end_panel, char* scratch) {
  constexpr int64_t kMost = kPanels;
  const Finish finish = finish_of<NUMBER == kInt8>(product);
  const int64_t panel_bytes = product.weight->lines * kLine;
  for (int64_t panel = first_panel; panel < end_panel;) {
    const int64_t left = end_panel - panel;
    // gated panels stay together
    const int64_t panels = product.gated ? 2 : left < kMost ? left : kMost == 3 && left == 4 ? 2 : kMost;
    const char* next = product.weight->panels + (panel + panels) * panel_bytes;
    const int64_t next_bytes = (left - panels < panels ? left - panels : panels) * panel_bytes;
    const int64_t pass_bytes = round_up(next_bytes / ((product.row_count + kRows - 1) / kRows), kLine);
    for (int64_t row = 0; row < product.row_count; row += kRows) {
      const int64_t rows = product.row_count - row < kRows ? product.row_count - row : kRows;
      const int64_t passed = row / kRows * pass_bytes, unasked = next_bytes > passed ? next_bytes - passed : 0;
      const Ahead ahead{next + passed, unasked < pass_bytes ? unasked : pass_bytes};
      if (panels == 1) multiply_rows_of_tile<NUMBER, 1>(product, finish, row, rows, panel, ahead, scratch);
      if (panels == 2) multiply_rows_of_tile<NUMBER, 2>(product, finish, row, rows, panel, ahead, scratch);
      if (panels == 3) multiply_rows_of_tile<NUMBER, kPanels>(product, finish, row, rows, panel, ahead, scratch);
    }
    panel += panels;
  }
}

// ---- products by AMX

#if HAS_AMX

static inline void configure_tiles() {
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static const Configuration configuration;
  _tile_loadconfig(&configuration);
}

// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 panels.
template <Number NUMBER, int BLOCKS, int PANELS>
static inline void multiply_tile(const char* rows, int64_t block_bytes, const char* panels, int64_t panel_bytes) {
  _tile_loadd(6, panels, kLine);
  _tile_loadd(4, rows, kLine);
  if (NUMBER == kInt8) {
    _tile_dpbssd(0, 4, 6);
  } else {
    _tile_dpbf16ps(0, 4, 6);
  }
  if (PANELS == 2) {
    _tile_loadd(7, panels + panel_bytes, kLine);
    if (NUMBER == kInt8) {
      _tile_dpbssd(1, 4, 7);
    } else {
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  if (BLOCKS == 2) {
    _tile_loadd(5, rows + block_bytes, kLine);
    if (NUMBER == kInt8) {
      _tile_dpbssd(2, 5, 6);
    } else {
      _tile_dpbf16ps(2, 5, 6);
    }
    if (PANELS == 2) {
      if (NUMBER == kInt8) {
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
}

constexpr int64_t kAmxStride = 2 * kLine;

// One block of 16 or 32 rows and columns, while the rows of the block before it are finished.
template <Number NUMBER, int BLOCKS, int PANELS>
static inline void multiply_tiles(
    const Product& product, Finish finish, int64_t block, int64_t panel, const Block& before, char* to,
    int64_t pass, int64_t passes) {
  const Weight& weight = *product.weight;
  const int64_t tiles = weight.lines / 16, panel_bytes = weight.lines * kLine;
  const char* rows = product.rows + block * tiles * kTile;
  const char* panels = weight.panels + panel * panel_bytes;
  _tile_zero(0);
  if (PANELS == 2) _tile_zero(1);
  if (BLOCKS == 2) _tile_zero(2);
  if (BLOCKS == 2 && PANELS == 2) _tile_zero(3);
  int64_t finished = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    // the next panels, of which each pass over the rows asks for its part
    const char* next = panels + PANELS * panel_bytes + tile * kTile;
    for (int64_t line = 2 * pass; line < 16; line += 2 * passes) {
      for (int p = 0; p < PANELS; ++p) _mm_prefetch(next + p * panel_bytes + line * kLine, _MM_HINT_T1);
    }
    multiply_tile<NUMBER, BLOCKS, PANELS>(rows + tile * kTile, tiles * kTile, panels + tile * kTile, panel_bytes);
    const int64_t due = before.rows * (tile + 1) / tiles;
    if (due > finished) finish(product, before, finished, due);
    finished = due;
  }
  _tile_stored(0, to, kAmxStride);
  if (PANELS == 2) _tile_stored(1, to + kLine, kAmxStride);
  if (BLOCKS == 2) _tile_stored(2, to + kBlock * kAmxStride, kAmxStride);
  if (BLOCKS == 2 && PANELS == 2) _tile_stored(3, to + kBlock * kAmxStride + kLine, kAmxStride);
}

template <Number NUMBER>
static void multiply_by_tiles(const Product& product, int64_t first_panel, int64_t end_panel, char* scratch) {
  const int64_t blocks = (product.row_count + kBlock - 1) / kBlock;
  const Finish finish = finish_of<NUMBER == kInt8>(product);
  configure_tiles();
  Block before{scratch, kAmxStride, 0, 0, 0, 0};
  int64_t turn = 0;
  for (int64_t panel = first_panel; panel < end_panel; panel += 2) {
    const int64_t panels = end_panel - panel < 2 ? 1 : 2;
    for (int64_t block = 0; block < blocks; block += 2) {
      char* to = scratch + turn * 32 * kAmxStride;
      const bool two = block + 1 < blocks;
      const int64_t pass = panel + 4 <= end_panel ? block / 2 : 16, passes = (blocks + 1) / 2;
      if (two && panels == 2) multiply_tiles<NUMBER, 2, 2>(product, finish, block, panel, before, to, pass, passes);
      if (two && panels == 1) multiply_tiles<NUMBER, 2, 1>(product, finish, block, panel, before, to, pass, passes);
      if (!two && panels == 2) multiply_tiles<NUMBER, 1, 2>(product, finish, block, panel, before, to, pass, passes);
      if (!two && panels == 1) multiply_tiles<NUMBER, 1, 1>(product, finish, block, panel, before, to, pass, passes);
      const int64_t row = block * kBlock, left = product.row_count - row;
      before = {to, kAmxStride, row, left < 2 * kBlock ? left : 2 * kBlock, panel, panels};
      turn ^= 1;
    }
  }
  finish(product, before, 0, before.rows);
  _tile_release();
}

#endif

static void multiply(const Product& product, int64_t first_panel, int64_t end_panel, char* scratch) {
  if (first_panel >= end_panel || product.row_count == 0) return;
#if HAS_AMX
  if (product.number == kBFloat16) return multiply_by_tiles<kBFloat16>(product, first_panel, end_panel, scratch);
  if (product.number == kInt8) return multiply_by_tiles<kInt8>(product, first_panel, end_panel, scratch);
#elif HAS_BF16
  if (product.number == kBFloat16) return multiply_by_vectors<kBFloat16>(product, first_panel, end_panel, scratch);
#endif
#if !HAS_AMX
  if (product.number == kInt8) return multiply_by_vectors<kInt8>(product, first_panel, end_panel, scratch);
#endif
  multiply_by_vectors<kFloat32>(product, first_panel, end_panel, scratch);
}

// ---- rows between products

static inline void copy_row(const char* from, Number number, int64_t width, float* to) {
  if (number == kBFloat16) {
    widen_row(reinterpret_cast<const Bf16*>(from), width, 1.f, to);
  } else {
    widen_row(reinterpret_cast<const float*>(from), width, 1.f, to);
  }
}

static inline void normalise(const float* from, int64_t width, const Norm& norm, float* to) {
  const int64_t whole = width - width % LANES;
  Floats total{};
  for (int64_t i = 0; i < whole; i += LANES) total += load(from + i);
  float mean = sum_of(total);
  for (int64_t i = whole; i < width; ++i) mean += from[i];
  mean /= static_cast<float>(width);
  Floats squares{};
  for (int64_t i = 0; i < whole; i += LANES) {
    const Floats deviation = load(from + i) - mean;
    squares += deviation * deviation;
  }
  float variance = sum_of(squares);
  for (int64_t i = whole; i < width; ++i) variance += (from[i] - mean) * (from[i] - mean);
  const float scale = 1.f / __builtin_sqrtf(variance / static_cast<float>(width) + norm.epsilon);
  // weights and biases are filled up to a whole panel with zeros, so that what lies behind the row becomes 0
  for (int64_t i = 0; i < whole; i += LANES) {
    Floats result = (load(from + i) - mean) * scale * load(norm.weight + i);
    if (norm.bias != nullptr) result += load(norm.bias + i);
    store(to + i, result);
  }
  for (int64_t i = whole; i < width; ++i) {
    const float result = (from[i] - mean) * scale * norm.weight[i];
    to[i] = norm.bias == nullptr ? result : result + norm.bias[i];
  }
}

static inline char* tile_line(char* tiles, int64_t lines, int64_t row, int64_t line) {
  return tiles + (row / kBlock * lines + line) * kTile + row % kBlock * kLine;
}

// The largest size of a number of the row, or NaN where one is NaN.
static inline float largest_size(const float* row, int64_t width) {
  Floats largest{};
  const int64_t whole = width - width % LANES;
  Floats bad{};
  for (int64_t i = 0; i < whole; i += LANES) {
    const Floats x = load(row + i), negative = -x;
    largest = larger(larger(x, negative), largest);
    bad += x * 0.f;  // NaN for what is not finite
  }
  float size = largest_of(largest), check = sum_of(bad);
  for (int64_t i = whole; i < width; ++i) {
    const float x = row[i] < 0 ? -row[i] : row[i];
    size = x > size ? x : size;
    check += row[i] * 0.f;
  }
  return check == 0.f ? size : check;
}

static inline void quantise_row(const float* row, const RowWork& work, int64_t at) {
  const float size = largest_size(row, work.width);
  const bool usual = size > 0.f;
  const float factor = usual ? 127.f / size : 0.f;
  work.row_scales[at] = size / 127.f;
  const int64_t bytes = work.lines * kLine;
  for (int64_t column = 0; column < bytes; column += kLine) {
    char* to = tile_line(work.tiles, work.lines, at, column / kLine);
    for (int64_t i = 0; i < kLine; i += LANES) {
      int32_t whole[LANES];
      if (usual && column + i + LANES <= work.width) {
        // adding 1.5 * 2^23 rounds to the nearest, ties to even, and leaves the number in the low bits
        const Ints rounded = (Ints)(load(row + column + i) * factor + 12582912.f) - 0x4b400000;
        __builtin_memcpy(whole, &rounded, sizeof rounded);
      } else {
        for (int lane = 0; lane < LANES; ++lane) {
          const int64_t j = column + i + lane;
          const float value = usual && j < work.width ? row[j] * factor : 0.f;
          whole[lane] = static_cast<int32_t>(__builtin_rintf(value));
        }
      }
      for (int lane = 0; lane < LANES; ++lane) {
#if HAS_VNNI && !HAS_AMX
        to[i + lane] = static_cast<char>(whole[lane] + 128);
#else
        to[i + lane] = static_cast<char>(whole[lane]);
#endif
      }
    }
  }
}

// `row` has zeros behind its width up to a whole panel.
static inline void tile_row(const float* row, const RowWork& work, int64_t at) {
  if (work.tile_number == kInt8) return quantise_row(row, work, at);
  const int64_t in_line = kLine / bytes_of(work.tile_number);
  const int64_t filled = (work.width + kPanel - 1) / kPanel * kPanel;
  for (int64_t line = 0; line < work.lines; ++line) {
    char* to = tile_line(work.tiles, work.lines, at, line);
    for (int64_t i = 0; i < in_line; i += LANES) {
      const int64_t column = line * in_line + i;
      const Floats lanes = column < filled ? load(row + column) : Floats{};
      if (work.tile_number == kBFloat16) {
        store_bf16(to + i * 2, lanes);
      } else {
        store(reinterpret_cast<float*>(to) + i, lanes);
      }
    }
  }
}

static void work_on_rows(const RowWork& work, int64_t first, int64_t end, char* scratch) {
  float* spare = reinterpret_cast<float*>(scratch);
  const int64_t filled = (work.width + kPanel - 1) / kPanel * kPanel;
  for (int64_t at = first; at < end; ++at) {
    float* row = work.sums == nullptr ? spare : work.sums + at * work.sums_stride;
    if (work.from != nullptr) {
      copy_row(work.from + at * work.from_stride, work.from_number, work.width, row);
      for (int64_t i = work.width; i < filled; ++i) row[i] = 0.f;
    }
    if (work.norm.weight != nullptr) {
      float* to = work.keeps_norm ? row : spare;
      normalise(row, work.width, work.norm, to);
      for (int64_t i = work.width; i < filled; ++i) to[i] = 0.f;
      row = to;
    }
    if (work.tiles != nullptr) tile_row(row, work, at);
    if (work.out == nullptr) continue;
    char* to = work.out + at * work.out_stride;
    if (work.out_number == kBFloat16) {
      narrow_row(row, work.width, 1.f, reinterpret_cast<Bf16*>(to));
    } else {
      narrow_row(row, work.width, 1.f, reinterpret_cast<float*>(to));
    }
  }
}

// ---- attention

// What has more than AVX-512 attends by vectors as AVX-512 does: those take long to compile.
#if !HAS_VNNI

namespace by_vectors {

// as in varlen_attention_cpu.cpp, whose kernel this is
struct Attention {
  const void *query, *key, *value;
  void* out;
  int64_t query_stride, key_stride, value_stride, out_stride;
  int64_t heads, head_size;
  float scale_log2;
  int64_t window;
  const float *cosines, *sines;
};

struct Kernels {
  void (*float32)(const Attention&, int64_t first, int64_t tokens, int64_t head, float* scratch);
  void (*bfloat16)(const Attention&, int64_t first, int64_t tokens, int64_t head, float* scratch);
};

#include "varlen_attention_simd.h"

}  // namespace by_vectors

#endif

#if HAS_AMX

namespace by_tiles {

// Fewer tokens of float32 are attended to faster by vectors.
constexpr int64_t kFewestSplit = 128;

// Whether AMX attends: heads of whole lines of bfloat16, whose queries see every key. Float32 rows of an int8 layer
// become sums of two bfloat16, a high and a low one.
static inline bool can_attend(const Heads& heads) {
  const bool fits = heads.number == kBFloat16 ? heads.tiles != nullptr : heads.quantised && heads.tokens >= kFewestSplit;
  return fits && heads.head_size % 32 == 0 && heads.cosines == nullptr && heads.window >= kNoWindow;
}

// What the kernel of one head needs: keys and values as tiles, and of 16 queries scores, weights and context. Lows are
// behind their highs, and those of bfloat16 rows are not used.
struct Scratch {
  char *queries, *queries_low, *keys, *keys_low, *values, *values_low, *high, *low;
  float *scores, *context;
};

static inline int64_t place(int64_t tokens, int64_t head_size, char* memory, Scratch* scratch) {
  const int64_t blocks = (tokens + 15) / 16, pairs = (tokens + 31) / 32, steps = head_size / 32;
  int64_t at = 0;
  const auto next = [&](int64_t bytes) {
    char* here = memory + at;
    at += bytes;
    return here;
  };
  Scratch result;
  result.queries = next(steps * kTile);
  result.queries_low = next(steps * kTile);
  result.keys = next(blocks * steps * kTile);
  result.values = next(pairs * 2 * steps * kTile);
  result.high = next(pairs * kTile);
  result.low = next(pairs * kTile);
  result.scores = reinterpret_cast<float*>(next(16 * pairs * 32 * 4));
  result.context = reinterpret_cast<float*>(next(16 * head_size * 4));
  result.keys_low = next(blocks * steps * kTile);
  result.values_low = next(pairs * 2 * steps * kTile);
  if (scratch != nullptr) *scratch = result;
  return at;
}

static inline Words as_words(Halves halves) {
  return __builtin_convertvector(halves, Words);
}

static inline Halves round_lanes(Floats x) {
  const auto rounded = _mm512_cvtneps_pbh(x);
  Halves halves;
  __builtin_memcpy(&halves, &rounded, sizeof halves);
  return halves;
}

// 16 numbers as bfloat16, and as bfloat16 what is left of them: together they are off by 2^-17 of the number. Products of
// two rests are left out, 2^-18 of those of the numbers.
static inline void split(Floats x, Halves& high, Halves& low) {
  high = round_lanes(x);
  low = round_lanes(x - (Floats)(as_words(high) << 16));
}

static inline void split_line(const float* from, char* high, char* low) {
  for (int half = 0; half < 2; ++half) {
    Halves highs, lows;
    split(load(from + half * 16), highs, lows);
    __builtin_memcpy(high + half * 32, &highs, sizeof highs);
    __builtin_memcpy(low + half * 32, &lows, sizeof lows);
  }
}

// Lines of 16 queries, [step][query] of 64 bytes.
static inline void split_queries(const char* rows, int64_t stride, int64_t count, int64_t steps, const Scratch& scratch) {
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t q = 0; q < count; ++q) {
      const auto* query = reinterpret_cast<const float*>(rows + q * stride) + step * 32;
      const int64_t at = step * kTile + q * kLine;
      split_line(query, scratch.queries + at, scratch.queries_low + at);
    }
  }
}

// Line j of a tile of keys holds numbers 2 j and 2 j + 1 of 16 keys.
template <bool SPLIT>
static inline void tile_keys(const char* keys, int64_t stride, int64_t tokens, int64_t steps, char* to, char* to_low) {
  for (int64_t token = 0; token < tokens; token += 16) {
    for (int64_t step = 0; step < steps; ++step) {
      Floats block[16], low[16];
      for (int64_t lane = 0; lane < 16; ++lane) {
        const char* key = keys + (token + lane < tokens ? token + lane : tokens - 1) * stride;
        if (SPLIT) {
          split_line(
              reinterpret_cast<const float*>(key) + step * 32, reinterpret_cast<char*>(block + lane),
              reinterpret_cast<char*>(low + lane));
        } else {
          block[lane] = load(reinterpret_cast<const float*>(key + step * kLine));
        }
      }
      transpose(block);
      for (int64_t line = 0; line < 16; ++line) store(reinterpret_cast<float*>(to + line * kLine), block[line]);
      to += kTile;
      if (!SPLIT) continue;
      transpose(low);
      for (int64_t line = 0; line < 16; ++line) store(reinterpret_cast<float*>(to_low + line * kLine), low[line]);
      to_low += kTile;
    }
  }
}

// Line j of a tile of values holds 16 numbers of tokens 2 j and 2 j + 1; zeros behind the last token.
template <bool SPLIT>
static inline void tile_values(
    const char* values, int64_t stride, int64_t tokens, int64_t columns, char* to, char* to_low) {
  // 16 numbers as words, and what is left of them
  const auto wide = [&](int64_t token, int64_t column, Words& low) {
    low = Words{};
    if (token >= tokens) return Words{};
    Halves halves, rest;
    if (SPLIT) {
      split(load(reinterpret_cast<const float*>(values + token * stride) + column * 16), halves, rest);
      low = as_words(rest);
      return as_words(halves);
    }
    __builtin_memcpy(&halves, values + token * stride + column * 32, sizeof halves);
    return as_words(halves);
  };
  for (int64_t token = 0; token < tokens; token += 32) {
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t line = 0; line < 16; ++line) {
        Words low[2];
        const Words even = wide(token + 2 * line, column, low[0]), odd = wide(token + 2 * line + 1, column, low[1]);
        const Words pair = even | odd << 16, pair_low = low[0] | low[1] << 16;
        __builtin_memcpy(to + line * kLine, &pair, sizeof pair);
        if (SPLIT) __builtin_memcpy(to_low + line * kLine, &pair_low, sizeof pair_low);
      }
      to += kTile;
      to_low += kTile;
    }
  }
}

// The scores of one query become weights, each as the sum of two bfloat16; returns the sum of the weights.
template <bool SPLIT>
static inline float weigh(const float* scores, int64_t tokens, float scale_log2, char* high, char* low) {
  const int64_t whole = tokens / 16 * 16;
  const __mmask16 rest = static_cast<__mmask16>((1u << (tokens - whole)) - 1);
  const Floats none = splat(-__builtin_inff());
  const Floats tail = _mm512_mask_loadu_ps(none, rest, scores + whole);
  Floats largest = tail;
  for (int64_t t = 0; t < whole; t += 16) largest = larger(load(scores + t), largest);
  const Floats shift = splat(-scale_log2 * largest_of(largest));
  Floats total{};
  for (int64_t t = 0; t < tokens; t += 32) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = t + half * 16, to = t / 32 * kTile + half * 32;
      const Floats lanes = at < whole ? load(scores + at) : at == whole ? tail : none;
      const Floats weight = decay<SPLIT>(lanes * scale_log2 + shift);
      total += weight;
      Halves highs, lows;
      split(weight, highs, lows);
      __builtin_memcpy(high + to, &highs, sizeof highs);
      __builtin_memcpy(low + to, &lows, sizeof lows);
    }
  }
  return sum_of(total);
}

// The compiler does not know that tiles are loaded from memory.
static inline void finish_stores() {
  __asm__ volatile("" ::: "memory");
}

template <bool SPLIT>
static inline void score_block(
    const char* query, int64_t stride, int64_t step_bytes, int64_t steps, int64_t blocks, const Scratch& scratch) {
  const int64_t row_bytes = (blocks + 1) / 2 * 32 * 4;
  for (int64_t block = 0; block < blocks; ++block) {
    _tile_zero(0);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t keys = (block * steps + step) * kTile;
      _tile_loadd(4, query + step * step_bytes, stride);
      _tile_loadd(6, scratch.keys + keys, kLine);
      _tile_dpbf16ps(0, 4, 6);
      if (!SPLIT) continue;
      _tile_loadd(5, scratch.queries_low + step * kTile, kLine);
      _tile_loadd(7, scratch.keys_low + keys, kLine);
      _tile_dpbf16ps(0, 4, 7);
      _tile_dpbf16ps(0, 5, 6);
    }
    _tile_stored(0, scratch.scores + block * 16, row_bytes);
  }
}

template <bool SPLIT>
static inline void sum_values(int64_t pairs, int64_t columns, const Scratch& scratch) {
  for (int64_t column = 0; column < columns; column += 2) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t values = (pair * columns + column) * kTile;
      _tile_loadd(4, scratch.high + pair * kTile, kLine);
      _tile_loadd(5, scratch.low + pair * kTile, kLine);
      _tile_loadd(6, scratch.values + values, kLine);
      _tile_loadd(7, scratch.values + values + kTile, kLine);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(1, 5, 7);
      if (!SPLIT) continue;
      _tile_loadd(6, scratch.values_low + values, kLine);
      _tile_loadd(7, scratch.values_low + values + kTile, kLine);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, scratch.context + column * 16, columns * kLine);
    _tile_stored(1, scratch.context + (column + 1) * 16, columns * kLine);
  }
}

// The context of one query, times a factor: bfloat16 into tiles, float32 into rows.
template <bool SPLIT>
static inline void leave(const Heads& heads, int64_t head, int64_t row, const float* context, float factor) {
  const int64_t steps = heads.head_size / 32;
  for (int64_t step = 0; step < steps; ++step, context += 32) {
    const Floats first = load(context) * factor, second = load(context + 16) * factor;
    if (SPLIT) {
      float* to = reinterpret_cast<float*>(heads.out + row * heads.out_stride) + head * heads.head_size + step * 32;
      store(to, first);
      store(to + 16, second);
    } else {
      const auto halves = _mm512_cvtne2ps_pbh(second, first);
      char* to = tile_line(heads.tiles, heads.lines, heads.first_row + row, head * steps + step);
      __builtin_memcpy(to, &halves, sizeof halves);
    }
  }
}

template <bool SPLIT>
static void attend_as(const Heads& heads, char* memory) {
  const int64_t tokens = heads.tokens, size = heads.head_size, steps = size / 32, columns = size / 16;
  const int64_t blocks = (tokens + 15) / 16, pairs = (tokens + 31) / 32, bytes = SPLIT ? 4 : 2;
  Scratch scratch;
  place(tokens, size, memory, &scratch);
  configure_tiles();
  for (int64_t head = heads.first; head < heads.end; ++head) {
    const char* query = heads.rows + head * size * bytes;
    const char* key = query + heads.width * bytes;
    tile_keys<SPLIT>(key, heads.stride, tokens, steps, scratch.keys, scratch.keys_low);
    tile_values<SPLIT>(key + heads.width * bytes, heads.stride, tokens, columns, scratch.values, scratch.values_low);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t queries = tokens - block * 16 < 16 ? tokens - block * 16 : 16;
      const char* rows = query + block * 16 * heads.stride;
      if (SPLIT) split_queries(rows, heads.stride, queries, steps, scratch);
      finish_stores();
      if (SPLIT) {
        score_block<true>(scratch.queries, kLine, kTile, steps, blocks, scratch);
      } else {
        score_block<false>(rows, heads.stride, kLine, steps, blocks, scratch);
      }
      float totals[16];
      for (int64_t q = 0; q < queries; ++q) {
        totals[q] = weigh<SPLIT>(
            scratch.scores + q * pairs * 32, tokens, heads.scale_log2, scratch.high + q * kLine, scratch.low + q * kLine);
      }
      finish_stores();
      sum_values<SPLIT>(pairs, columns, scratch);
      for (int64_t q = 0; q < queries; ++q) {
        leave<SPLIT>(heads, head, block * 16 + q, scratch.context + q * size, 1.f / totals[q]);
      }
    }
  }
  _tile_release();
}

static void attend(const Heads& heads, char* memory) {
  return heads.number == kBFloat16 ? attend_as<false>(heads, memory) : attend_as<true>(heads, memory);
}

}  // namespace by_tiles

#endif

static int64_t attention_scratch(int64_t tokens, int64_t head_size) {
  const int64_t vectors = 4 * (2 * tokens * head_size + 32 * (2 * head_size + tokens)) + 64;
#if HAS_AMX
  const int64_t tiles = by_tiles::place(tokens, head_size + 31, nullptr, nullptr);
  return vectors > tiles ? vectors : tiles;
#else
  return vectors;
#endif
}

static bool attends_to_tiles(const Heads& heads) {
#if HAS_AMX
  return by_tiles::can_attend(heads) && heads.number == kBFloat16;
#else
  (void)heads;
  return false;
#endif
}

static void attend(const Heads& heads, char* scratch) {
#if HAS_AMX
  if (by_tiles::can_attend(heads)) return by_tiles::attend(heads, scratch);
#endif
#if HAS_VNNI
  avx512_kernels()->attend(heads, scratch);
#else
  const int64_t size = bytes_of(heads.number), stride = heads.stride / size;
  const by_vectors::Attention call{
      heads.rows,
      heads.rows + heads.width * size,
      heads.rows + 2 * heads.width * size,
      heads.out,
      stride,
      stride,
      stride,
      heads.out_stride / size,
      heads.width / heads.head_size,
      heads.head_size,
      heads.scale_log2,
      heads.window,
      heads.cosines,
      heads.sines};
  const auto kernel = heads.number == kBFloat16 ? by_vectors::kKernels.bfloat16 : by_vectors::kKernels.float32;
  for (int64_t head = heads.first; head < heads.end; ++head) {
    kernel(call, 0, heads.tokens, head, reinterpret_cast<float*>(scratch));
  }
#endif
}

static const Kernels kKernels{
    NAME,
    {true, HAS_BF16 ? true : false, true},
    multiply,
    work_on_rows,
    attend,
    attends_to_tiles,
    attention_scratch};
