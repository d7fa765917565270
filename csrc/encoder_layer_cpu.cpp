// encoder_layers on CPU: which instruction set runs, what packed weights say, and how threads share the work.
//
// Rows that suffice for all threads are cut into groups of whole sequences, each of which one thread takes through all
// layers: nothing waits, and what lies between products stays in its second cache. Fewer rows are taken through a layer
// by all threads together, each of which reads its part of the weights. Every number is added up in the same order both
// ways, and whatever the other rows are.
#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "encoder_layer.h"
#include "packed_rows.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastkd::encoder_layer {
namespace {

using torch::headeronly::ScalarType;
// ---- instruction sets

// The places in INSTRUCTION_SETS of ops/encoder_layer.py.
enum Level : int64_t { kDefault, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };

#if defined(__x86_64__)
// Linux gives tiles to processes that ask.
bool allows_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Level found_level() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kDefault;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512bw")) {
    return kAvx2;
  }
  unsigned a = 0, b = 0, c = 0, d = 0, bf16 = 0, unused = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(c >> 11 & 1)) return kAvx512;
  if (a < 1 || !__get_cpuid_count(7, 1, &bf16, &unused, &unused, &unused) || !(bf16 >> 5 & 1)) return kAvx512Vnni;
  const bool has_tiles = d >> 22 & d >> 24 & d >> 25 & 1;  // for bfloat16, at all, for int8
  return has_tiles ? kAmx : kAvx512Bf16;
}
#else
Level found_level() {
  return kDefault;
}
#endif

// As ATEN_CPU_CAPABILITY lowers PyTorch and ONEDNN_MAX_CPU_ISA oneDNN.
Level allowed_level() {
  Level level = kAmx;
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  if (capability && std::string(capability) == "default") level = kDefault;
  if (capability && std::string(capability) == "avx2") level = kAvx2;
  const char* variable = std::getenv("ONEDNN_MAX_CPU_ISA");
  std::string isa = variable ? variable : "";
  for (char& letter : isa) letter = letter >= 'a' && letter <= 'z' ? letter - 'a' + 'A' : letter;
  const std::pair<const char*, Level> names[] = {
      {"SSE41", kDefault},
      {"AVX", kDefault},
      {"AVX2", kAvx2},
      {"AVX2_VNNI", kAvx2},
      {"AVX2_VNNI_2", kAvx2},
      {"AVX512_CORE", kAvx512},
      {"AVX512_CORE_VNNI", kAvx512Vnni},
      {"AVX512_CORE_BF16", kAvx512Bf16},
      {"AVX512_CORE_FP16", kAvx512Bf16},
      {"AVX10_1_512", kAvx512Bf16},
  };
  for (const auto& [name, limit] : names) {
    if (isa == name) level = std::min(level, limit);
  }
  return level;
}

struct Chosen {
  Level level = kDefault;
  const Kernels* kernels = baseline_kernels();
};

Chosen find() {
  const Level most = std::min(found_level(), allowed_level());
  const std::pair<Level, const Kernels* (*)()> files[] = {
      {kAmx, amx_kernels},
      {kAvx512Bf16, avx512_bf16_kernels},
      {kAvx512Vnni, avx512_vnni_kernels},
      {kAvx512, avx512_kernels},
      {kAvx2, avx2_kernels},
  };
  for (const auto& [level, kernels] : files) {
    if (level > most || kernels() == nullptr) continue;
#if defined(__x86_64__)
    if (level == kAmx && !allows_tiles()) continue;
#endif
    return {level, kernels()};
  }
  return {};
}

const Chosen chosen = [] {
  const Chosen found = find();
  chosen_instruction_sets().emplace_back("encoder_layer", found.kernels->name);
  return found;
}();

int64_t encoder_layer_instructions_cpu() {
  return chosen.level;
}

// ---- packed layers

constexpr int64_t kMagic = 0x6661737462657274;
constexpr int64_t kHeaderWords = 48;

struct Layer {
  Number number;         // of the products
  Number hidden_number;  // of the hidden states
  int64_t hidden, width, intermediate, heads;
  Activation activation;
  bool gated, norm_first;
  int64_t window;  // -1: none
  float scale_log2;
  Weight project, output, expand, contract;
  Norm attention_norm, feed_forward_norm;
  const float *cosines = nullptr, *sines = nullptr;
  int64_t places = 0;

  int64_t head_size() const {
    return width / heads;
  }
};

double as_double(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A header and its places, as ops/encoder_layer.py writes them.
Layer read_layer(const TensorView& packed) {
  STD_TORCH_CHECK(
      packed.is_cpu() && packed.dim() == 1 && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
          packed.numel() >= kHeaderWords * 8,
      "layers: expected the output of pack_encoder_layer");
  const auto* bytes = static_cast<const char*>(packed.const_data_ptr());
  int64_t words[kHeaderWords];
  std::memcpy(words, bytes, sizeof words);
  STD_TORCH_CHECK(
      words[0] == kMagic && words[1] == packed.numel(),
      "layers: expected the output of this version's pack_encoder_layer");
  Layer layer{};
  layer.number = static_cast<Number>(words[2]);
  layer.hidden_number = static_cast<Number>(words[3]);
  layer.hidden = words[4];
  layer.width = words[5];
  layer.intermediate = words[6];
  layer.heads = words[7];
  layer.activation = static_cast<Activation>(words[8]);
  layer.gated = words[9] != 0;
  layer.norm_first = words[10] != 0;
  layer.window = words[11];
  STD_TORCH_CHECK(
      layer.number >= 0 && layer.number < kNumbers && chosen.kernels->multiplies[layer.number],
      "layers: packed for an instruction set that this process does not use; pack them again");
  layer.scale_log2 = static_cast<float>(as_double(words[15]) * 1.4426950408889634);
  const int64_t* places = words + 16;
  const auto product = [&](int64_t columns, int64_t terms) {
    const int64_t panel_count = round_up(columns, kPanel) / kPanel;
    const int64_t lines = round_up(terms * bytes_of(layer.number), kLine) / 4;  // of 4 bytes of a row each
    const auto vector = [&](int64_t place, int64_t next) { return next > place ? bytes + place : nullptr; };
    Weight weight{
        bytes + places[0],
        reinterpret_cast<const float*>(vector(places[1], places[2])),
        reinterpret_cast<const float*>(vector(places[2], places[3])),
        reinterpret_cast<const int32_t*>(vector(places[3], places[4])),
        panel_count,
        lines};
    STD_TORCH_CHECK(
        places[0] + panel_count * lines * kLine <= packed.numel(), "layers: expected the output of pack_encoder_layer");
    places += 4;
    return weight;
  };
  layer.project = product(3 * layer.width, layer.hidden);
  layer.output = product(layer.hidden, layer.width);
  layer.expand = product(layer.gated ? 2 * round_up(layer.intermediate, kPanel) : layer.intermediate, layer.hidden);
  layer.contract = product(layer.hidden, layer.intermediate);
  const auto norm = [&](int64_t place, int64_t next, int64_t end, int64_t epsilon) {
    Norm result{};
    if (next > place) result.weight = reinterpret_cast<const float*>(bytes + place);
    if (end > next) result.bias = reinterpret_cast<const float*>(bytes + next);
    result.epsilon = static_cast<float>(as_double(epsilon));
    return result;
  };
  layer.attention_norm = norm(places[0], places[1], places[2], words[13]);
  layer.feed_forward_norm = norm(places[2], places[3], packed.numel(), words[14]);
  return layer;
}

// ---- memory

// What lies between the products of one group of sequences.
struct Buffers {
  float* sums;      // [rows, sums_stride]: the residual stream
  char* input;      // tiles: of the first and of the third product
  char* heads;      // rows: queries, keys, values
  char* attended;   // rows
  char* context;    // tiles: of the second product
  char* expanded;   // tiles: of the fourth product
  char* activated;  // int8: float32 rows before they become tiles
  float* row_scales;
};

// Sizes that are the same for all layers of a call.
struct Shapes {
  int64_t sums_stride = 0;  // floats
  int64_t input_lines = 0, context_lines = 0, expanded_lines = 0;
  int64_t heads_stride = 0, attended_stride = 0, activated_stride = 0;  // bytes
  int64_t widest = 0, head_size = 0;

  void include(const Layer& layer) {
    const int64_t size = bytes_of(layer.hidden_number);
    const auto lines = [&](int64_t terms) { return round_up(terms * bytes_of(layer.number), kLine) / kLine; };
    sums_stride = round_up(layer.hidden, kPanel);
    input_lines = std::max(input_lines, lines(layer.hidden));
    context_lines = std::max(context_lines, lines(layer.width));
    expanded_lines = std::max(expanded_lines, lines(layer.intermediate));
    heads_stride = std::max(heads_stride, layer.project.panel_count * kPanel * size);
    attended_stride = std::max(attended_stride, round_up(layer.width, kPanel) * size);
    if (layer.number == kInt8) {
      activated_stride = std::max(activated_stride, round_up(layer.intermediate, kPanel) * 4);
    }
    widest = std::max({widest, sums_stride, round_up(layer.width, kPanel), round_up(layer.intermediate, kPanel)});
    head_size = std::max(head_size, layer.head_size());
  }

  // Bytes of `rows` rows, and where each buffer lies in them.
  int64_t place(int64_t rows, char* memory, Buffers* buffers) const {
    const int64_t blocks = round_up(rows, kBlock) / kBlock;
    int64_t at = 0;
    const auto next = [&](int64_t bytes) {
      char* here = memory + at;
      at += round_up(bytes, kLine);
      return here;
    };
    Buffers result{};
    result.sums = reinterpret_cast<float*>(next(blocks * kBlock * sums_stride * 4));
    result.input = next(blocks * input_lines * kTile);
    result.row_scales = reinterpret_cast<float*>(next(blocks * kBlock * 4));
    const int64_t shared = at;
    // queries, keys and values are done with when the third product begins
    // AMX reads whole blocks of queries, from any row on
    result.heads = next((blocks + 1) * kBlock * heads_stride);
    result.attended = next(blocks * kBlock * attended_stride);
    result.context = next(blocks * context_lines * kTile);
    const int64_t end = at;
    at = shared;
    result.expanded = next(blocks * expanded_lines * kTile);
    result.activated = next(blocks * kBlock * activated_stride);
    at = std::max(at, end);
    if (buffers != nullptr) *buffers = result;
    return at;
  }

  int64_t scratch(int64_t longest) const {
    const int64_t attention = chosen.kernels->attention_scratch(longest, head_size);
    return round_up(std::max({kProductScratch, widest * 4 + 256, attention}), 4096);
  }
};

// ---- one group of sequences through the layers

struct Part {
  int64_t index, count;
};

struct Range {
  int64_t first, end;
};

// The share of one thread in `count` things of which `step` belong together.
Range share(int64_t count, Part part, int64_t step = 1) {
  const int64_t groups = (count + step - 1) / step;
  const int64_t first = groups * part.index / part.count * step, end = groups * (part.index + 1) / part.count * step;
  return {std::min(first, count), std::min(end, count)};
}

struct Group {
  const Shapes& shapes;
  Buffers buffers;
  const int32_t* bounds;  // of its sequences
  int64_t sequences;
  const char* from;  // its rows
  char* out;
  int64_t row_stride;  // bytes

  int64_t row_count() const {
    return bounds[sequences] - bounds[0];
  }
};

class LayerRun {
 public:
  LayerRun(const Layer& layer, const Group& group) : layer_(layer), group_(group), kernels_(*chosen.kernels) {}

  // Rows into float32, and the input of the first product.
  void enter(const char* from, Part part, char* scratch) const {
    RowWork work = sums();
    work.from = from;
    work.from_number = layer_.hidden_number;
    work.from_stride = group_.row_stride;
    if (layer_.norm_first) work.norm = layer_.attention_norm;
    to_tiles(work, group_.buffers.input, lines(layer_.project));
    on_rows(work, part, scratch);
  }

  // Whether a thread can multiply the columns of its heads and attend with them at once.
  bool joins_attention(int64_t threads) const {
    return threads == 1 || (layer_.head_size() % kPanel == 0 && layer_.heads % threads == 0);
  }

  void project(Part part, char* scratch) const {
    const Range panels = share(layer_.project.panel_count, part);
    kernels_.multiply(project_product(), panels.first, panels.end, scratch);
  }

  void project_heads(Part part, char* scratch) const {
    const Range heads = share(layer_.heads, part);
    const int64_t panels = layer_.head_size() / kPanel;
    for (int64_t third = 0; third < 3; ++third) {
      const int64_t first = third * layer_.width / kPanel;
      kernels_.multiply(project_product(), first + heads.first * panels, first + heads.end * panels, scratch);
    }
  }

  void attend(Part part, char* scratch) const {
    const Range heads = share(layer_.heads, part);
    const Buffers& buffers = group_.buffers;
    for (int64_t b = 0; b < group_.sequences; ++b) {
      const int64_t first = group_.bounds[b] - group_.bounds[0], tokens = group_.bounds[b + 1] - group_.bounds[b];
      if (tokens == 0) continue;
      Heads work = heads_of(tokens);
      work.rows = buffers.heads + first * group_.shapes.heads_stride;
      work.first = heads.first;
      work.end = heads.end;
      work.out = buffers.attended + first * group_.shapes.attended_stride;
      work.first_row = first;
      kernels_.attend(work, scratch);
    }
  }

  bool attends_to_tiles() const {
    return kernels_.attends_to_tiles(heads_of(1));
  }

  void tile_context(Part part, char* scratch) const {
    RowWork work{};
    work.from = group_.buffers.attended;
    work.from_number = layer_.hidden_number;
    work.from_stride = group_.shapes.attended_stride;
    work.width = layer_.width;
    to_tiles(work, group_.buffers.context, lines(layer_.output));
    on_rows(work, part, scratch);
  }

  void output(Part part, char* scratch) const {
    const Range panels = share(layer_.output.panel_count, part, 2);
    Product product = sums_product(layer_.output, group_.buffers.context);
    kernels_.multiply(product, panels.first, panels.end, scratch);
  }

  void between(Part part, char* scratch) const {
    RowWork work = sums();
    work.norm = layer_.norm_first ? layer_.feed_forward_norm : layer_.attention_norm;
    work.keeps_norm = !layer_.norm_first;
    to_tiles(work, group_.buffers.input, lines(layer_.expand));
    on_rows(work, part, scratch);
  }

  void expand(Part part, char* scratch) const {
    const bool quantised = layer_.number == kInt8;
    Product product = base_product(layer_.expand, group_.buffers.input);
    product.activation = layer_.activation;
    product.gated = layer_.gated;
    product.sink = quantised ? Sink::kRows : Sink::kTiles;
    product.out_number = quantised ? kFloat32 : layer_.number;
    product.out = quantised ? group_.buffers.activated : group_.buffers.expanded;
    product.out_stride = quantised ? group_.shapes.activated_stride : lines(layer_.contract);
    const Range panels = share(layer_.expand.panel_count, part, layer_.gated ? 4 : 2);
    if (!quantised && part.index == 0) clear_last_lines();
    kernels_.multiply(product, panels.first, panels.end, scratch);
  }

  void tile_activated(Part part, char* scratch) const {
    RowWork work{};
    work.from = group_.buffers.activated;
    work.from_number = kFloat32;
    work.from_stride = group_.shapes.activated_stride;
    work.width = layer_.intermediate;
    to_tiles(work, group_.buffers.expanded, lines(layer_.contract));
    on_rows(work, part, scratch);
  }

  void contract(Part part, char* scratch) const {
    const Range panels = share(layer_.contract.panel_count, part, 2);
    kernels_.multiply(sums_product(layer_.contract, group_.buffers.expanded), panels.first, panels.end, scratch);
  }

  void leave(Part part, char* scratch) const {
    RowWork work = sums();
    if (!layer_.norm_first) work.norm = layer_.feed_forward_norm;
    work.out = group_.out;
    work.out_number = layer_.hidden_number;
    work.out_stride = group_.row_stride;
    on_rows(work, part, scratch);
  }

  bool is_quantised() const {
    return layer_.number == kInt8;
  }

 private:
  static int64_t lines(const Weight& weight) {
    return weight.lines / 16;
  }

  RowWork sums() const {
    RowWork work{};
    work.sums = group_.buffers.sums;
    work.sums_stride = group_.shapes.sums_stride;
    work.width = layer_.hidden;
    return work;
  }

  void to_tiles(RowWork& work, char* tiles, int64_t lines) const {
    work.tiles = tiles;
    work.lines = lines;
    work.tile_number = layer_.number;
    work.row_scales = group_.buffers.row_scales;
  }

  void on_rows(const RowWork& work, Part part, char* scratch) const {
    const Range rows = share(group_.row_count(), part);
    kernels_.work_on_rows(work, rows.first, rows.end, scratch);
  }

  Product base_product(const Weight& weight, const char* rows) const {
    Product product{};
    product.weight = &weight;
    product.number = layer_.number;
    product.rows = rows;
    product.row_scales = group_.buffers.row_scales;
    product.row_count = group_.row_count();
    product.activation = kNone;
    return product;
  }

  Product project_product() const {
    Product product = base_product(layer_.project, group_.buffers.input);
    product.sink = Sink::kRows;
    product.out_number = layer_.hidden_number;
    product.out = group_.buffers.heads;
    product.out_stride = group_.shapes.heads_stride;
    return product;
  }

  Product sums_product(const Weight& weight, const char* rows) const {
    Product product = base_product(weight, rows);
    product.sink = Sink::kSums;
    product.out_number = kFloat32;
    product.out = reinterpret_cast<char*>(group_.buffers.sums);
    product.out_stride = group_.shapes.sums_stride * 4;
    return product;
  }

  Heads heads_of(int64_t tokens) const {
    Heads work{};
    work.number = layer_.hidden_number;
    work.quantised = is_quantised();
    work.stride = group_.shapes.heads_stride;
    work.tokens = tokens;
    work.width = layer_.width;
    work.head_size = layer_.head_size();
    work.scale_log2 = layer_.scale_log2;
    work.window = layer_.window < 0 ? kNoWindow : layer_.window;
    work.cosines = layer_.cosines;
    work.sines = layer_.sines;
    work.out_stride = group_.shapes.attended_stride;
    if (layer_.number == kBFloat16) work.tiles = group_.buffers.context;
    work.lines = lines(layer_.output);
    return work;
  }

  // Columns behind the last panel, which the fourth product reads; its weights are zero there.
  void clear_last_lines() const {
    const int64_t tile_lines = lines(layer_.contract), blocks = round_up(group_.row_count(), kBlock) / kBlock;
    if (round_up(layer_.intermediate, kPanel) * bytes_of(layer_.number) == tile_lines * kLine) return;
    for (int64_t block = 0; block < blocks; ++block) {
      char* last = group_.buffers.expanded + ((block + 1) * tile_lines - 1) * kTile;
      const int64_t used = round_up(layer_.intermediate, kPanel) * bytes_of(layer_.number) % kLine;
      for (int64_t row = 0; row < kBlock; ++row) std::memset(last + row * kLine + used, 0, kLine - used);
    }
  }

  const Layer& layer_;
  const Group& group_;
  const Kernels& kernels_;
};

// Runs `phase(part, scratch)` for every thread, one after the other phases.
template <typename Phase>
void together(int64_t threads, char* scratch, int64_t scratch_size, const Phase& phase) {
  if (threads == 1) return phase(Part{0, 1}, scratch);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) phase(Part{t, threads}, scratch + t * scratch_size);
  });
}

void run_group(const std::vector<Layer>& layers, const Group& group, int64_t threads, char* scratch, int64_t scratch_size) {
  const auto all = [&](const auto& phase) { together(threads, scratch, scratch_size, phase); };
  for (size_t n = 0; n < layers.size(); ++n) {
    const LayerRun run(layers[n], group);
    if (n == 0) all([&](Part part, char* own) { run.enter(group.from, part, own); });
    if (run.joins_attention(threads)) {
      all([&](Part part, char* own) {
        if (threads == 1) run.project(part, own);
        if (threads > 1) run.project_heads(part, own);
        run.attend(part, own);
      });
    } else {
      all([&](Part part, char* own) { run.project(part, own); });
      all([&](Part part, char* own) { run.attend(part, own); });
    }
    if (!run.attends_to_tiles()) all([&](Part part, char* own) { run.tile_context(part, own); });
    all([&](Part part, char* own) { run.output(part, own); });
    all([&](Part part, char* own) { run.between(part, own); });
    all([&](Part part, char* own) { run.expand(part, own); });
    if (run.is_quantised()) all([&](Part part, char* own) { run.tile_activated(part, own); });
    all([&](Part part, char* own) { run.contract(part, own); });
    all([&](Part part, char* own) {
      run.leave(part, own);
      if (n + 1 < layers.size()) LayerRun(layers[n + 1], group).enter(group.out, part, own);
    });
  }
}

// ---- groups

// Bytes between products that one group may take: what leaves room for weights in a second cache of 2 MB.
constexpr int64_t kGroupBytes = 1536 * 1024;
// With fewer rows a thread, all threads work on the same rows.
constexpr int64_t kRowsPerThread = 48;

// Where groups begin and end, in sequences; empty where the threads should work together.
std::vector<int64_t> cut(const int32_t* bounds, int64_t sequences, int64_t threads, const Shapes& shapes) {
  const int64_t rows = bounds[sequences];
  std::vector<int64_t> cuts{0};
  const int64_t most = std::max<int64_t>(kBlock, kGroupBytes / std::max<int64_t>(1, shapes.place(kBlock, nullptr, nullptr)) * kBlock);
  const int64_t groups = threads * std::max<int64_t>(1, (rows + threads * most - 1) / (threads * most));
  int64_t sequence = 0;
  for (int64_t g = 1; g <= groups; ++g) {
    const int64_t end = rows * g / groups;
    while (sequence < sequences && (bounds[sequence] + bounds[sequence + 1]) / 2 < end) ++sequence;
    if (g == groups) sequence = sequences;
    cuts.push_back(sequence);
  }
  if (threads == 1) return cuts;
  // the slowest thread's rows, as parallel_for hands out the groups
  const int64_t per_thread = groups / threads;
  int64_t largest = 0;
  for (int64_t t = 0; t < threads; ++t) {
    largest = std::max<int64_t>(largest, bounds[cuts[(t + 1) * per_thread]] - bounds[cuts[t * per_thread]]);
  }
  const bool is_even = largest * threads * 4 <= rows * 5;
  if (rows < threads * kRowsPerThread || !is_even) return {};
  return cuts;
}

}  // namespace

const Kernels& chosen_kernels() {
  return *chosen.kernels;
}

void encoder_layers(
    const TensorView& hidden_states, const TensorView& cu_seqlens, const std::vector<TensorView>& packed,
    const std::vector<TensorView>& rotary, const TensorView& out) {
  STD_TORCH_CHECK(!packed.empty(), "layers: expected at least one");
  STD_TORCH_CHECK(
      rotary.empty() || rotary.size() == packed.size(), "rotary: expected no tables, or one for every layer");
  STD_TORCH_CHECK(
      cu_seqlens.is_cpu() && cu_seqlens.dim() == 1 && cu_seqlens.scalar_type() == ScalarType::Int &&
          cu_seqlens.is_contiguous() && cu_seqlens.numel() >= 1,
      "cu_seqlens: expected contiguous int32 [B + 1]");
  const auto dtype = hidden_states.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "hidden_states: expected float32 or bfloat16");
  for (const TensorView* tensor : {&hidden_states, &out}) {
    STD_TORCH_CHECK(
        tensor->is_cpu() && tensor->dim() == 2 && tensor->is_contiguous() && tensor->scalar_type() == dtype &&
            tensor->size(0) == hidden_states.size(0) && tensor->size(1) == hidden_states.size(1),
        "hidden_states, out: expected contiguous [R, H], both of one dtype");
  }
  check_no_overlap<TensorView>({hidden_states, cu_seqlens}, {out});
  const int64_t rows = hidden_states.size(0), hidden = hidden_states.size(1), sequences = cu_seqlens.numel() - 1;
  const auto* bounds = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  STD_TORCH_CHECK(
      bounds[0] == 0 && bounds[sequences] <= rows,
      "cu_seqlens: expected the first value to be 0 and the last at most R");
  int64_t longest = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    STD_TORCH_CHECK(bounds[b] <= bounds[b + 1], "cu_seqlens: expected values that never decrease");
    longest = std::max<int64_t>(longest, bounds[b + 1] - bounds[b]);
  }
  std::vector<Layer> layers;
  Shapes shapes;
  for (size_t n = 0; n < packed.size(); ++n) {
    Layer layer = read_layer(packed[n]);
    STD_TORCH_CHECK(
        layer.hidden == hidden && layer.hidden_number == (dtype == ScalarType::Float ? kFloat32 : kBFloat16),
        "layers[", n, "]: packed for another width or dtype than hidden_states has; pack it again");
    if (!rotary.empty()) {
      const TensorView& table = rotary[n];
      STD_TORCH_CHECK(
          table.is_cpu() && table.dim() == 3 && table.size(0) == 2 && table.scalar_type() == ScalarType::Float &&
              table.is_contiguous() && 2 * table.size(2) == layer.head_size() && table.size(1) >= longest,
          "rotary[", n,
          "]: expected contiguous float32 [2, positions, head size / 2] with at least ", longest, " positions");
      layer.cosines = static_cast<const float*>(table.const_data_ptr());
      layer.sines = layer.cosines + table.size(1) * table.size(2);
    }
    layers.push_back(layer);
    shapes.include(layer);
  }
  const int64_t used = bounds[sequences];
  const int64_t row_bytes = hidden * out.element_size();
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  if (rows > used && row_bytes) std::memset(target + used * row_bytes, 0, (rows - used) * row_bytes);
  if (used == 0 || hidden == 0) return;

  const auto* source = static_cast<const char*>(hidden_states.const_data_ptr());
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t scratch_size = shapes.scratch(longest);
  const auto run = [&](int64_t first, int64_t end, int64_t together_on_it) {
    static thread_local Arena arena;
    const int64_t group_rows = bounds[end] - bounds[first];
    if (group_rows == 0) return;
    const int64_t buffer_bytes = round_up(shapes.place(group_rows, nullptr, nullptr), 4096);
    char* memory = arena.take(buffer_bytes + together_on_it * scratch_size);
    Group group{
        shapes, {}, bounds + first, end - first, source + bounds[first] * row_bytes, target + bounds[first] * row_bytes,
        row_bytes};
    shapes.place(group_rows, memory, &group.buffers);
    run_group(layers, group, together_on_it, memory + buffer_bytes, scratch_size);
  };
  const std::vector<int64_t> cuts = cut(bounds, sequences, threads, shapes);
  if (cuts.empty()) return run(0, sequences, threads);
  const auto groups = static_cast<int64_t>(cuts.size()) - 1;
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) run(cuts[g], cuts[g + 1], 1);
  });
}

namespace {

using torch::stable::Tensor;

std::vector<TensorView> views_of(const std::vector<Tensor>& tensors) {
  std::vector<TensorView> views;
  for (const Tensor& tensor : tensors) views.push_back(TensorView::of(tensor));
  return views;
}

void encoder_layers_cpu(
    Tensor hidden_states, Tensor cu_seqlens, std::vector<Tensor> packed, std::vector<Tensor> rotary, Tensor out) {
  encoder_layers(
      TensorView::of(hidden_states), TensorView::of(cu_seqlens), views_of(packed), views_of(rotary),
      TensorView::writable(out));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CPU, m) {
  m.impl("encoder_layers_", TORCH_BOX(&encoder_layers_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(fastkd_kernels, CompositeExplicitAutograd, m) {
  m.impl("encoder_layer_instructions", TORCH_BOX(&encoder_layer_instructions_cpu));
}

}  // namespace fastkd::encoder_layer
