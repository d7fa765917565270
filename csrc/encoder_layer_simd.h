// Products, row work and attention of an encoder layer; compiled once per instruction set by encoder_layer_level.h.
#include "simd_vectors.h"

constexpr int kVectors = kPanel / LANES;  // in a line of a panel

// ---- activations

// x Phi(x) = max(x, 0) - |x| / 2 erfc(|x| / sqrt 2), where erfc is a power of two of a polynomial, fitted to at most 4e-8
// of error in the result (6e-7 for bfloat16).
template <bool PRECISE>
static inline Floats gelu(Floats x) {
  const Floats negative = -x;
  const Floats size = larger(x, negative);
  const Floats t = size < 20.f ? size : splat(20.f);  // beyond, and for NaN, the first term is all
  Floats exponent;
  if (PRECISE) {
    exponent = t * -1.9020279751202906e-06f + 2.8056438168277964e-05f;
    exponent = exponent * t - 0.0001314705441473052f;
    exponent = exponent * t - 0.00027208306710235775f;
    exponent = exponent * t + 0.007245432119816542f;
    exponent = exponent * t - 0.05262761935591698f;
    exponent = exponent * t - 0.4591621458530426f;
    exponent = exponent * t - 1.1511110067367554f;
  } else {
    exponent = t * -0.0004881023778580129f + 0.007198719307780266f;
    exponent = exponent * t - 0.052146632224321365f;
    exponent = exponent * t - 0.45959585905075073f;
    exponent = exponent * t - 1.1510004997253418f;
  }
  return larger(Floats{}, x) - t * 0.5f * power_of_two(exponent * t);
}

// x / (1 + exp(-y))
static inline Floats times_sigmoid(Floats x, Floats y) {
  const Floats negative = -y;
  const Floats size = larger(y, negative);
  const Floats small = power_of_two(size * -1.4426950408889634f);
  const Floats one = splat(1.f);
  return x * (y < 0.f ? small : one) / (one + small);
}

template <bool PRECISE>
static inline Floats activate(Activation activation, Floats x) {
  switch (activation) {
    case kGelu: return gelu<PRECISE>(x);
    case kTanhGelu: return times_sigmoid(x, x * (1.5957691216057308f + 0.07135481282553487f * (x * x)));
    case kRelu: return larger(Floats{}, x);
    case kSilu: return times_sigmoid(x, x);
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

// Sums of a block of a product: float32 or int32 rows of `panels` panels, of which the first is `panel` of the weight.
struct Block {
  const char* sums;
  int64_t stride;  // bytes
  int64_t first_row, rows;
  int64_t panel, panels;
};

// The columns of one vector, with bias.
template <bool INTEGERS>
static inline Floats column_sums(const Product& product, const Block& block, int64_t row, int64_t panel, int v) {
  const char* at = block.sums + row * block.stride + (panel * kVectors + v) * LANES * 4;
  const int64_t column = ((block.panel + panel) * kVectors + v) * LANES;
  Floats result;
  if (INTEGERS) {
    Ints sums;
    __builtin_memcpy(&sums, at, sizeof sums);
    const Floats scale = load(product.weight->scales + column) * product.row_scales[block.first_row + row];
    result = __builtin_convertvector(sums, Floats) * scale;
  } else {
    result = load(reinterpret_cast<const float*>(at));
  }
  return product.weight->bias == nullptr ? result : result + load(product.weight->bias + column);
}

template <bool INTEGERS>
static inline void finish_row(const Product& product, const Block& block, int64_t row) {
  const int64_t at_row = block.first_row + row;
  const int64_t step = product.gated ? 2 : 1;
  const bool narrow = product.out_number == kBFloat16;
  for (int64_t panel = 0; panel < block.panels; panel += step) {
    const int64_t out_panel = (block.panel + panel) / step;
    for (int v = 0; v < kVectors; ++v) {
      Floats result = column_sums<INTEGERS>(product, block, row, panel, v);
      if (product.activation != kNone) {
        result = narrow ? activate<false>(product.activation, result) : activate<true>(product.activation, result);
      }
      if (product.gated) result *= column_sums<INTEGERS>(product, block, row, panel + 1, v);
      const int64_t column = (out_panel * kVectors + v) * LANES;
      if (product.sink == Sink::kSums) {
        float* to = reinterpret_cast<float*>(product.out + at_row * product.out_stride) + column;
        store(to, load(to) + result);
        continue;
      }
      const int64_t byte = column * (narrow ? 2 : 4);
      char* to = product.sink == Sink::kRows
          ? product.out + at_row * product.out_stride + byte
          : product.out + ((at_row / kBlock) * product.out_stride + byte / kLine) * kTile + at_row % kBlock * kLine +
              byte % kLine;
      if (narrow) {
        store_bf16(to, result);
      } else {
        store(reinterpret_cast<float*>(to), result);
      }
    }
  }
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

template <Number NUMBER, int ROWS, int PANELS>
static inline void multiply_block(
    const char* rows, const char* panels, int64_t panel_bytes, int64_t lines, char* to, int64_t stride) {
  using Sums = typename Terms<NUMBER>::Sums;
  Sums sums[ROWS][PANELS * kVectors] = {};
  for (int64_t tile = 0; tile < lines / 16; ++tile) {
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
    const Product& product, int64_t first, int64_t rows, int64_t panel, char* scratch) {
  const Weight& weight = *product.weight;
  const int64_t panel_bytes = weight.lines * kLine;
  const char* from = product.rows + first / kBlock * (weight.lines / 16) * kTile + first % kBlock * kLine;
  const char* panels = weight.panels + panel * panel_bytes;
  constexpr int64_t stride = PANELS * kLine;
  int64_t done = 0;
  if (kRows == 8 && rows == 8) {
    multiply_block<NUMBER, kRows, PANELS>(from, panels, panel_bytes, weight.lines, scratch, stride);
    done = kRows;
  }
  if (rows - done >= 4 && kRows >= 4) {
    multiply_block<NUMBER, kRows >= 4 ? 4 : 1, PANELS>(
        from + done * kLine, panels, panel_bytes, weight.lines, scratch + done * stride, stride);
    done += 4;
  }
  if (rows - done >= 2) {
    multiply_block<NUMBER, 2, PANELS>(
        from + done * kLine, panels, panel_bytes, weight.lines, scratch + done * stride, stride);
    done += 2;
  }
  if (rows - done >= 1) {
    multiply_block<NUMBER, 1, PANELS>(
        from + done * kLine, panels, panel_bytes, weight.lines, scratch + done * stride, stride);
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
  for (int64_t row = 0; row < rows; ++row) finish_row<NUMBER == kInt8>(product, block, row);
}

template <Number NUMBER>
static void multiply_by_vectors(const Product& product, int64_t first_panel, int64_t end_panel, char* scratch) {
  constexpr int64_t kMost = kPanels;
  for (int64_t panel = first_panel; panel < end_panel;) {
    const int64_t left = end_panel - panel;
    // gated panels stay together
    const int64_t panels = product.gated ? 2 : left < kMost ? left : kMost == 3 && left == 4 ? 2 : kMost;
    for (int64_t row = 0; row < product.row_count; row += kRows) {
      const int64_t rows = product.row_count - row < kRows ? product.row_count - row : kRows;
      if (panels == 1) multiply_rows_of_tile<NUMBER, 1>(product, row, rows, panel, scratch);
      if (panels == 2) multiply_rows_of_tile<NUMBER, 2>(product, row, rows, panel, scratch);
      if (panels == 3) multiply_rows_of_tile<NUMBER, kPanels>(product, row, rows, panel, scratch);
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
    const Product& product, int64_t block, int64_t panel, const Block& before, char* to, bool prefetches) {
  const Weight& weight = *product.weight;
  const int64_t tiles = weight.lines / 16, panel_bytes = weight.lines * kLine;
  const char* rows = product.rows + block * tiles * kTile;
  const char* panels = weight.panels + panel * panel_bytes;
  _tile_zero(0);
  if (PANELS == 2) _tile_zero(1);
  if (BLOCKS == 2) _tile_zero(2);
  if (BLOCKS == 2 && PANELS == 2) _tile_zero(3);
  int64_t finished = 0, due = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (prefetches) {
      const char* next = panels + PANELS * panel_bytes + tile * kTile;
      for (int p = 0; p < PANELS; ++p) {
        for (int64_t line = 0; line < 16; ++line) _mm_prefetch(next + p * panel_bytes + line * kLine, _MM_HINT_T1);
      }
    }
    multiply_tile<NUMBER, BLOCKS, PANELS>(rows + tile * kTile, tiles * kTile, panels + tile * kTile, panel_bytes);
    for (due += before.rows; finished * tiles < due && finished < before.rows; ++finished) {
      finish_row<NUMBER == kInt8>(product, before, finished);
    }
  }
  _tile_stored(0, to, kAmxStride);
  if (PANELS == 2) _tile_stored(1, to + kLine, kAmxStride);
  if (BLOCKS == 2) _tile_stored(2, to + kBlock * kAmxStride, kAmxStride);
  if (BLOCKS == 2 && PANELS == 2) _tile_stored(3, to + kBlock * kAmxStride + kLine, kAmxStride);
}

template <Number NUMBER>
static void multiply_by_tiles(const Product& product, int64_t first_panel, int64_t end_panel, char* scratch) {
  const int64_t blocks = (product.row_count + kBlock - 1) / kBlock;
  configure_tiles();
  Block before{scratch, kAmxStride, 0, 0, 0, 0};
  int64_t turn = 0;
  for (int64_t panel = first_panel; panel < end_panel; panel += 2) {
    const int64_t panels = end_panel - panel < 2 ? 1 : 2;
    for (int64_t block = 0; block < blocks; block += 2) {
      char* to = scratch + turn * 32 * kAmxStride;
      const bool two = block + 1 < blocks, prefetches = block == 0 && panel + 4 <= end_panel;
      if (two && panels == 2) multiply_tiles<NUMBER, 2, 2>(product, block, panel, before, to, prefetches);
      if (two && panels == 1) multiply_tiles<NUMBER, 2, 1>(product, block, panel, before, to, false);
      if (!two && panels == 2) multiply_tiles<NUMBER, 1, 2>(product, block, panel, before, to, prefetches);
      if (!two && panels == 1) multiply_tiles<NUMBER, 1, 1>(product, block, panel, before, to, false);
      const int64_t row = block * kBlock, left = product.row_count - row;
      before = {to, kAmxStride, row, left < 2 * kBlock ? left : 2 * kBlock, panel, panels};
      turn ^= 1;
    }
  }
  for (int64_t row = 0; row < before.rows; ++row) finish_row<NUMBER == kInt8>(product, before, row);
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

static int64_t attention_scratch(int64_t tokens, int64_t head_size) {
  return 4 * (2 * tokens * head_size + 32 * (2 * head_size + tokens)) + 64;
}

static bool attends_to_tiles(const Heads&) {
  return false;
}

static void attend(const Heads& heads, char* scratch) {
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
}

#define FASTKD_QUOTED(name) FASTKD_TEXT(name)
static const Kernels kKernels{
    FASTKD_QUOTED(LEVEL),
    {true, HAS_BF16 ? true : false, true},
    multiply,
    work_on_rows,
    attend,
    attends_to_tiles,
    attention_scratch};
#undef FASTKD_QUOTED
