// What csrc/lora_rows.cpp and the kernels that it chooses from agree on.
#pragma once

#include "attention.h"

namespace heatsink {

constexpr int64_t kTokens = 48;  // tokens of a task at most, whose h stays in the nearest cache
// Sums over channels go over this many before they are added to what came before. The bits depend
// on it.
constexpr int64_t kChannels = 64;
constexpr int64_t kPitch = kChannels + kLanes;  // floats between tokens of a block of channels

// Pixels of the rows. Of tokens, which are an image of one column, `w` means nothing.
struct Pixels {
  const char* data;
  Element element;
  int64_t row, h, w, channel;  // strides in elements
};

// One slot of the bank in fp32, in vectors of 16 along ranks and outputs:
// down: [tap][rank / 16][channel, up to a multiple of 4][16]; up: [rank][output], padded.
struct Packed {
  int64_t slot, rank;
  float *down, *up;
};

struct RowAdapter {
  const Packed* packed;
  float scale;
};

// A row that has adapters: those of `adapters` from `first` to before `last`.
struct ActiveRow {
  int64_t row, first, last;
};

// One call of heatsink::lora_rows; a linear layer is a convolution of an image of one column.
struct LoraRows {
  Pixels x;
  const char *a, *b;
  char* y;
  Element element;                           // of x and y
  Element bank;                              // of a and b
  int64_t a_slot, a_rank, a_channel, a_tap;  // strides in elements
  int64_t b_slot, b_rank, b_output;
  int64_t y_row, y_token, y_output;
  int64_t inputs, outputs, taps, kernel_w;
  int64_t height, width, out_width, tokens, chunk;
  int64_t step_h, step_w, pad_h, pad_w, dilation_h, dilation_w;
  const Packed* packed;
  const RowAdapter* adapters;
  const ActiveRow* rows;
  float* image;  // of the rows at hand: (row, h, w, channel up to a multiple of 16)
};

inline int64_t channels_of_panel(const LoraRows& c) { return round_up(c.inputs, 4); }
// An odd number of cache lines, which spreads the ranks over the sets of a cache.
inline int64_t output_pitch(const LoraRows& c) { return round_up(c.outputs, 2 * kLanes) + kLanes; }
inline int64_t image_pitch(const LoraRows& c) { return round_up(c.inputs, kLanes); }

// What is done with items begin..end-1: slots of `packed`, each of its taps and then its B; lines
// of images; tasks of `chunk` tokens of one row.
enum class LoraStep { Pack, Image, Rows };

// Floats of scratch for a row of so many ranks, in so many vectors.
constexpr int64_t lora_scratch(int64_t ranks, int64_t blocks) {
  const int64_t sums = kTokens * kLanes * (blocks > 4 ? blocks : 4);
  const int64_t pointers = round_up(ranks * static_cast<int64_t>(sizeof(float*) / 4), kLanes);
  return kTokens * kPitch + kLanes * 4 * kChannels + sums + kTokens * kLanes * blocks + pointers;
}

// Every one gives the same bits.
using LoraKernel = void (*)(const LoraRows&, LoraStep step, int64_t begin, int64_t end,
                            float* scratch);
void lora_rows_portable(const LoraRows& c, LoraStep step, int64_t begin, int64_t end,
                        float* scratch);
#ifdef HEATSINK_X86_KERNELS
void lora_rows_avx2(const LoraRows& c, LoraStep step, int64_t begin, int64_t end, float* scratch);
void lora_rows_avx512(const LoraRows& c, LoraStep step, int64_t begin, int64_t end, float* scratch);
#endif

}  // namespace heatsink
