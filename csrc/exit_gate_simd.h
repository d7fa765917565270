// Uncertainties of the CPU exit gate; compiled once per instruction set by simd_levels.h.
#include "simd_vectors.h"

// LANES columns of kTileRows rows, interleaved: tile[c * kTileRows + row].
static void interleave_columns(const float* from, int64_t stride, float* tile) {
  for (int64_t row = 0; row < kTileRows; row += LANES) {
    Floats rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) rows[i] = load(from + (row + i) * stride);
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) store(tile + i * kTileRows + row, rows[i]);
  }
}

// ln s for finite s >= 1, as k ln 2 + ln(1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
static inline Floats logarithm(Floats s) {
  const Ints bits = (Ints)s;
  const Ints k = (bits - 0x3f3504f3) >> 23;
  const Floats f = (Floats)(bits - (k << 23)) - 1.f;
  Floats p = f * -0.07634492963552475f + 0.12761574983596802f;
  p = p * f + -0.13160182535648346f;
  p = p * f + 0.14201758801937103f;
  p = p * f + -0.16623356938362122f;
  p = p * f + 0.20001226663589478f;
  p = p * f + -0.2500081956386566f;
  p = p * f + 0.3333333134651184f;
  const Floats exponent = __builtin_convertvector(k, Floats);
  const Floats square = f * f;
  return exponent * 0.693359375f + (f - exponent * 2.12194440e-4f - square * 0.5f + square * f * p);
}

struct Largest {
  Floats first, second;
};

struct Sums {
  Floats total, weighted;  // of 2^y and y 2^y, where y = (logit - maximum) / ln 2
};

static inline void include(Largest& largest, Floats x) {
  const Floats loser = x > largest.first ? largest.first : x;
  largest.first = larger(x, largest.first);
  largest.second = larger(loser, largest.second);
}

// In powers of two, clamped to where they are 0: there the weighted term must be 0 too, and is not for y = -inf.
static inline Floats binary_exponent(Floats difference) {
  return larger(splat(-127.f), difference * 1.44269504f);
}

static inline void include(Sums& sums, Floats difference) {
  const Floats y = binary_exponent(difference);
  const Floats weight = bounded_power_of_two(y);
  sums.total += weight;
  sums.weighted += weight * y;
}

static inline Floats uncertainty(Largest largest, Sums sums, Criterion criterion, float scale) {
  Floats u = splat(__builtin_nanf(""));
  switch (criterion) {  // without a default: the compiler names a criterion that is missing here
    case kMaxProb:
      u = (1.f - 1.f / sums.total) / scale;
      break;
    case kMargin:
      u = 1.f - (1.f - bounded_power_of_two(binary_exponent(largest.second - largest.first))) / sums.total;
      break;
    case kEntropy:
    case kTopN:
      u = (logarithm(sums.total) - 0.693147181f * sums.weighted / sums.total) / scale;
      break;
    case kPatience:  // comes from the history, not from the logits of one layer
      break;
  }
  // both comparisons are false for NaN, which passes through
  u = u < 0.f ? splat(0.f) : u;
  return u > 1.f ? splat(1.f) : u;
}

// Uncertainties of kTileRows rows whose logits are interleaved: tile[c * kTileRows + row].
static void tile_uncertainties(const float* tile, int64_t columns, Criterion criterion, float scale, float* out) {
  const Floats lowest = splat(-__builtin_inff());
  for (int64_t lane = 0; lane < kTileRows; lane += LANES) {
    const float* from = tile + lane;
    Largest largest{lowest, lowest};
    if (criterion == kMargin) {
      for (int64_t c = 0; c < columns; ++c) include(largest, load(from + c * kTileRows));
    } else {
      Floats odd = lowest;  // a second maximum halves the chain of dependent operations
      for (int64_t c = 0; c + 1 < columns; c += 2) {
        largest.first = larger(load(from + c * kTileRows), largest.first);
        odd = larger(load(from + (c + 1) * kTileRows), odd);
      }
      largest.first = larger(odd, larger(load(from + (columns - 1) * kTileRows), largest.first));
    }
    Sums sums{};
    for (int64_t c = 0; c < columns; ++c) include(sums, load(from + c * kTileRows) - largest.first);
    store(out + lane, uncertainty(largest, sums, criterion, scale));
  }
}

// Uncertainty of one long contiguous row.
static float row_uncertainty(const float* row, int64_t columns, Criterion criterion, float scale) {
  const Floats lowest = splat(-__builtin_inff());
  const int64_t whole = columns - columns % LANES;
  float padded[LANES];
  store(padded, lowest);
  for (int64_t c = whole; c < columns; ++c) padded[c - whole] = row[c];
  const Floats tail = load(padded);

  Largest lanes{lowest, lowest};
  for (int64_t c = 0; c < whole; c += LANES) include(lanes, load(row + c));
  include(lanes, tail);
  float first = lanes.first[0], second = lanes.second[0];
  for (int lane = 1; lane < LANES; ++lane) {
    const float challenger = lanes.first[lane], loser = challenger > first ? first : challenger;
    first = challenger > first ? challenger : first;
    second = loser > second ? loser : second;
    second = lanes.second[lane] > second ? lanes.second[lane] : second;
  }

  Sums sums{};
  const int64_t block = 64 * LANES;  // summed apart, so that rounding errors do not grow with the length of the row
  for (int64_t begin = 0; begin < whole; begin += block) {
    const int64_t end = begin + block < whole ? begin + block : whole;
    Sums partial{};
    for (int64_t c = begin; c < end; c += LANES) include(partial, load(row + c) - first);
    sums.total += partial.total;
    sums.weighted += partial.weighted;
  }
  include(sums, tail - first);
  float total = 0, weighted = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    total += sums.total[lane];
    weighted += sums.weighted[lane];
  }
  return uncertainty({splat(first), splat(second)}, {splat(total), splat(weighted)}, criterion, scale)[0];
}

static const Kernels kKernels{LANES, interleave_columns, tile_uncertainties, row_uncertainty};
