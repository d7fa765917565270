// What the drivers of an encoder layer and of a student head have in common with their kernels for each instruction set.
//
// Inputs of products lie in tiles: a row is cut into lines of 64 bytes, and the same line of 16 rows is one tile of 1 KiB.
// Weights lie in panels: line k of a panel holds, for 16 columns, the terms that fill 4 bytes each (one float32, two
// bfloat16, four int8). So a product of any type adds up, for line k, 4 bytes of each row times 64 bytes of the panel, and
// 16 lines of a panel are one tile of AMX.
#pragma once

#include <cstdint>

#include "simd.h"

namespace fastkd::encoder_layer {

constexpr int64_t kPanel = 16;  // columns
constexpr int64_t kLine = 64;   // bytes
constexpr int64_t kBlock = 16;  // rows of a tile
constexpr int64_t kTile = kBlock * kLine;

// The numbers that ops/encoder_layer.py writes.
enum Number : int64_t { kFloat32, kBFloat16, kInt8, kNumbers };
enum Activation : int64_t { kGelu, kTanhGelu, kRelu, kSilu, kActivations, kNone, kTanh };

inline int64_t bytes_of(Number number) {
  return number == kFloat32 ? 4 : number == kBFloat16 ? 2 : 1;
}

// Where a product goes.
enum class Sink {
  kRows,   // row after row, whole panels, as float32 or bfloat16
  kTiles,  // as the input of the next product
  kSums,   // added to float32 rows
};

// One packed matrix.
struct Weight {
  const char* panels;
  const float* bias;     // of each column, or null
  const float* scales;   // int8: of each column
  const int32_t* sums;   // int8: of the column's numbers
  int64_t panel_count;
  int64_t lines;         // of a panel, a multiple of 16
};

struct Product {
  const Weight* weight;
  Number number;            // of the weights and of the rows
  const char* rows;         // tiles
  const float* row_scales;  // int8
  int64_t row_count;
  Sink sink;
  Activation activation;
  bool gated;         // panels come in pairs: the activated first one times the second
  Number out_number;  // float32 or bfloat16
  char* out;
  int64_t out_stride;  // bytes between rows, or lines of a row in tiles
};

struct Norm {
  const float *weight, *bias;  // null: no normalisation, no bias
  float epsilon;
};

// What happens to rows between products; each step is left out where its pointers are null.
struct RowWork {
  const char* from;  // rows that become float32
  Number from_number;
  int64_t from_stride;  // bytes
  float* sums;          // float32 rows: where `from` goes to, and else the input
  int64_t sums_stride;  // floats
  int64_t width;
  Norm norm;
  bool keeps_norm;  // whether `sums` becomes its normalisation
  char* tiles;      // the result as input of a product
  int64_t lines;
  Number tile_number;
  float* row_scales;  // int8
  char* out;          // the result as rows
  Number out_number;
  int64_t out_stride;  // bytes
};

constexpr int64_t kNoWindow = int64_t{1} << 40;

// Queries, keys and values of some heads of one sequence.
struct Heads {
  const char* rows;  // of the sequence: queries, keys, values
  Number number;
  bool quantised;  // an int8 layer's, for whose activations 2^-17 is nothing
  int64_t stride;  // bytes between rows
  int64_t tokens;
  int64_t width;  // of all heads
  int64_t head_size;
  int64_t first, end;  // heads
  float scale_log2;
  int64_t window;                // tokens to each side; kNoWindow: all
  const float *cosines, *sines;  // [places, head_size / 2], or null
  char* out;                     // rows of the whole width
  int64_t out_stride;            // bytes
  char* tiles;  // bfloat16: where heads end with a line, the input of the next product instead
  int64_t first_row, lines;
};

struct Kernels {
  const char* name;
  bool multiplies[kNumbers];
  void (*multiply)(const Product&, int64_t first_panel, int64_t end_panel, char* scratch);
  void (*work_on_rows)(const RowWork&, int64_t first, int64_t end, char* scratch);
  void (*attend)(const Heads&, char* scratch);
  // whether `attend` writes tiles
  bool (*attends_to_tiles)(const Heads&);
  // bytes for a call of `attend` on a sequence
  int64_t (*attention_scratch)(int64_t tokens, int64_t head_size);
};

constexpr int64_t kProductScratch = 2 * 32 * 48 * 4;

// One a file, each compiled for its instruction set; null where this compiler or machine has it not.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();

// Those that this process runs.
const Kernels& chosen_kernels();

inline int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

}  // namespace fastkd::encoder_layer
