// What csrc/attention.cpp and the kernels that it chooses from agree on.
#pragma once

#include <cstdint>

#include "lanes.h"
#include "tile.h"

namespace heatsink {

// Strides in elements. For the bias, `token` walks along the queries and `channel` along the keys.
struct Operand {
  const void* data;
  int64_t batch, token, head, channel;
};

// One call of heatsink::attention. A task is `chunk` queries of one head of one sample; tasks are
// numbered with the chunk innermost, then the head, then the sample.
struct Attention {
  Operand q, k, v, bias;                   // bias.data may be null
  void* out;                               // (batch, queries, heads, channels), channels dense
  int64_t out_batch, out_token, out_head;  // strides in elements
  Element element;
  int64_t batch, queries, keys, heads, channels;
  int64_t chunk;
  float scale;
  bool causal;
};

// Sums go over this many keys or channels before they are added to what came before: long sums
// would lose digits. The bits depend on both.
constexpr int64_t kKeyBlock = 128;
constexpr int64_t kChannelBlock = 64;
// The same of bfloat16, whose products are summed as tile.h says (csrc/attention_pairs.h).
constexpr int64_t kPairBlock = 256;

// Distance of rows of `channels` floats in scratch; the odd number of cache lines of long ones
// spreads them over the sets of a cache.
constexpr int64_t row_pitch(int64_t channels) {
  return round_up(channels, kLanes) + (channels < 128 ? 0 : kLanes);
}

// Distances of rows of channels and of keys of bfloat16 in scratch, in bytes.
constexpr int64_t pair_pitch(int64_t channels) { return 2 * round_up(channels, kTile) + 64; }
constexpr int64_t kPairKeys = 2 * kPairBlock + 64;

// Floats of scratch that a thread needs.
inline int64_t scratch_floats(const Attention& a) {
  if (a.element == Element::BFloat16) {
    const int64_t channels = round_up(a.channels, kTile);
    const int64_t rows = kLanes * ((channels > kPairBlock ? channels : kPairBlock) + kLanes);
    return a.chunk * (channels / 2 + channels + 2) + kPairBlock * pair_pitch(a.channels) / 4 +
           channels * kPairKeys / 4 + 2 * kPairBlock * (kPanel + kPanel / 2) + kPairBlock * kLanes +
           rows;
  }
  const int64_t pitch = row_pitch(a.channels);
  const int64_t rows = kLanes * (pitch > kKeyBlock ? pitch : kKeyBlock);
  return 2 * a.chunk * (pitch + 1) + 2 * kKeyBlock * pitch + 4 * kKeyBlock * kLanes + rows;
}

// Tasks begin..end-1 with the named instructions. Every one gives the same bits.
using AttentionKernel = void (*)(const Attention&, int64_t begin, int64_t end, float* scratch);
void attention_portable(const Attention& a, int64_t begin, int64_t end, float* scratch);

#ifdef HEATSINK_X86_KERNELS
void attention_avx2(const Attention& a, int64_t begin, int64_t end, float* scratch);
void attention_avx512(const Attention& a, int64_t begin, int64_t end, float* scratch);
void attention_amx(const Attention& a, int64_t begin, int64_t end, float* scratch);
#endif

}  // namespace heatsink
