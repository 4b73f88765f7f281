// The kernel of lora_rows, for a set of vector operations `I`; included once for every set.
//
// The 16 lanes of a vector are 16 ranks of h = x A^T, and then 16 outputs. Every sum stays in its
// lane and goes term by term, in blocks of channels, so a token's bits depend on nothing but that
// token and its row's adapters, and are the same for every width of register.
//
// No standard header here: the instruction set may be raised where this is included.
#pragma once

#include "attention_rows.h"
#include "interface.h"
#include "lora_rows.h"

namespace heatsink {
namespace {

// out[c][lane] = rows[lane][c] for 16 rows, `pitch` floats between the columns of `out`.
template <typename I>
void transpose_to(Rows rows, int64_t columns, float* out, int64_t pitch) {
  for (int64_t c = 0; c < columns; c += 4) {
    typename I::V a[4];
    for (int64_t r = 0; r < 4; ++r) {
      a[r] = I::gather(rows.data + r * rows.pitch + c, rows.pitch);
    }
    I::transpose(a);
    for (int64_t r = 0; r < 4 && c + r < columns; ++r) {
      I::store(out + (c + r) * pitch, a[r]);
    }
  }
}

// A of one tap of a slot. Ranks past the last repeat it: what comes of them is not used.
template <typename I>
void pack_down(const LoraRows& c, const Packed& slot, int64_t tap, float* scratch) {
  constexpr int64_t kColumns = 4 * kChannels;
  const int64_t size = size_of(c.bank);
  const int64_t blocks = round_up(slot.rank, kLanes) / kLanes;
  const char* const a = c.a + (slot.slot * c.a_slot + tap * c.a_tap) * size;
  for (int64_t block = 0; block < blocks; ++block) {
    float* const out = slot.down + (tap * blocks + block) * channels_of_panel(c) * kLanes;
    for (int64_t first = 0; first < c.inputs; first += kColumns) {
      const Plane part{a + first * c.a_channel * size, c.bank, c.a_rank, c.a_channel};
      const int64_t columns = smaller(kColumns, c.inputs - first);
      const Rows rows =
          rows_of<I>(part, block * kLanes, kLanes, slot.rank - 1, columns, scratch, kColumns);
      transpose_to<I>(rows, columns, out + first * kLanes, kLanes);
    }
  }
}

template <typename I>
void pack_up(const LoraRows& c, const Packed& slot) {
  const int64_t size = size_of(c.bank);
  const Plane b{c.b + slot.slot * c.b_slot * size, c.bank, c.b_rank, c.b_output};
  read_rows<I>(b, 0, slot.rank, slot.rank - 1, 0, c.outputs, slot.up, output_pitch(c));
}

// One line of an image with its channels innermost.
template <typename I>
void turn_line(const LoraRows& c, int64_t row, int64_t line, float* out, float* scratch) {
  constexpr int64_t kColumns = 4 * kChannels;
  const int64_t size = size_of(c.element);
  const int64_t pitch = image_pitch(c);
  const char* const x = c.x.data + (row * c.x.row + line * c.x.h) * size;
  for (int64_t first = 0; first < c.width; first += kColumns) {
    const Plane part{x + first * c.x.w * size, c.element, c.x.channel, c.x.w};
    const int64_t columns = smaller(kColumns, c.width - first);
    for (int64_t channel = 0; channel < c.inputs; channel += kLanes) {
      const Rows rows = rows_of<I>(part, channel, kLanes, c.inputs - 1, columns, scratch, kColumns);
      transpose_to<I>(rows, columns, out + first * pitch + channel, pitch);
    }
  }
}

// y[i * stride] += delta[i] for `count` of 16 elements, rounded once.
template <typename I>
HEATSINK_INLINE void add_to(Element element, typename I::V delta, char* y, int64_t stride,
                            int64_t count) {
  if (stride == 1 && count == kLanes) {
    narrow<I>(element, I::add(widen<I>(element, y), delta), y);
    return;
  }
  const int64_t size = size_of(element);
  alignas(64) char few[kLanes * 4] = {};
  collect(y, stride, count, size, few);
  narrow<I>(element, I::add(widen<I>(element, few), delta), few);
  for (int64_t i = 0; i < count; ++i) {
    if (size == 4) {
      __builtin_memcpy(y + 4 * i * stride, few + 4 * i, 4);
    } else {
      __builtin_memcpy(y + 2 * i * stride, few + 2 * i, 2);
    }
  }
}

// A chunk of tokens of one row.
template <typename I>
struct LoraTask {
  using V = typename I::V;
  // Vectors side by side, and tokens beside them: as many sums as registers hold.
  static constexpr int kWide = I::kGroups == 2 ? 4 : 1;
  static constexpr int tokens_beside(int vectors) {
    return vectors == 4 || I::kGroups != 2 ? 6 : 12;
  }

  const LoraRows& c;
  const ActiveRow& row;
  int64_t place;  // of the row among those of the image
  int64_t first, tokens;
  float* x;
  float* sums;         // [rank / 16][token][16]; later of 4 vectors of outputs
  float* h;            // [rank][token]
  const float** rows;  // B's row of every rank
  float* turned;

  LoraTask(const LoraRows& call, int64_t index, int64_t chunk, float* memory)
      : c(call), row(call.rows[index]), place(index), first(chunk * call.chunk) {
    tokens = smaller(c.chunk, c.tokens - first);
    int64_t blocks = 0;
    for (int64_t i = row.first; i < row.last; ++i) {
      blocks += blocks_of(*c.adapters[i].packed);
    }
    x = memory;
    turned = x + kTokens * kPitch;
    sums = turned + kLanes * 4 * kChannels;
    h = sums + kTokens * kLanes * (blocks > 4 ? blocks : 4);
    rows = reinterpret_cast<const float**>(h + kTokens * kLanes * blocks);
  }

  // x[t] = `columns` channels from `channel` on of what a tap sees; zero outside the image.
  void load(int64_t tap, int64_t channel, int64_t columns) {
    Pixels from = c.x;
    const char* data = from.data;
    if (c.image != nullptr) {
      const int64_t pitch = image_pitch(c);
      from = {nullptr, Element::Float, 0, c.width * pitch, pitch, 1};
      data = reinterpret_cast<const char*>(c.image + place * c.height * c.width * pitch);
    } else {
      data += row.row * from.row * size_of(from.element);
    }
    const int64_t size = size_of(from.element);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t token = first + t;
      const int64_t h_at =
          token / c.out_width * c.step_h + tap / c.kernel_w * c.dilation_h - c.pad_h;
      const int64_t w_at =
          token % c.out_width * c.step_w + tap % c.kernel_w * c.dilation_w - c.pad_w;
      float* const to = x + t * kPitch;
      if (h_at < 0 || h_at >= c.height || w_at < 0 || w_at >= c.width) {
        for (int64_t i = 0; i < columns; i += kLanes) {
          I::store(to + i, I::splat(0.0f));
        }
        continue;
      }
      const Plane pixel{data + (h_at * from.h + w_at * from.w) * size, from.element, 0,
                        from.channel};
      read_rows<I>(pixel, 0, 1, 0, channel, columns, to, kPitch);
    }
  }

  // h[v][t] += x[t] . A of N vectors of ranks and M tokens.
  template <int N, int M>
  HEATSINK_INLINE void shrink_tile(const float* down, int64_t next, int64_t columns, int64_t t,
                                   float* out, bool begins) {
    V dot[M * N];
#pragma GCC unroll 24
    for (int i = 0; i < M * N; ++i) {
      dot[i] = I::splat(0.0f);
    }
    const float* from = x + t * kPitch;
    for (int64_t k = 0; k < columns; ++k) {
      V a[N];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        a[v] = I::load(down + v * next + k * kLanes);
      }
#pragma GCC unroll 24
      for (int i = 0; i < M * N; ++i) {
        dot[i] = I::fma(a[i % N], I::splat(from[i / N * kPitch + k]), dot[i]);
      }
    }
#pragma GCC unroll 24
    for (int i = 0; i < M * N; ++i) {
      float* const kept = out + (i % N * kTokens + t + i / N) * kLanes;
      I::store(kept, begins ? dot[i] : I::add(I::load(kept), dot[i]));
    }
  }

  template <int N, int M>
  HEATSINK_INLINE void shrink_tiles(const float* down, int64_t next, int64_t columns, int64_t t,
                                    float* out, bool begins) {
    for (; t + M <= tokens; t += M) {
      shrink_tile<N, M>(down, next, columns, t, out, begins);
    }
    if constexpr (M > 1) {
      shrink_tiles<N, M / 2>(down, next, columns, t, out, begins);
    }
  }

  template <int N>
  HEATSINK_INLINE void shrink_blocks(const float* down, int64_t block, int64_t blocks,
                                     int64_t columns, float* out, bool begins) {
    const int64_t next = channels_of_panel(c) * kLanes;
    for (; block + N <= blocks; block += N) {
      shrink_tiles<N, tokens_beside(N)>(down + block * next, next, columns, 0,
                                        out + block * kTokens * kLanes, begins);
    }
    if constexpr (N > 1) {
      shrink_blocks<N / 2>(down, block, blocks, columns, out, begins);
    }
  }

  static int64_t blocks_of(const Packed& packed) { return round_up(packed.rank, kLanes) / kLanes; }

  // x A^T of every adapter, one after the other.
  void shrink() {
    for (int64_t tap = 0; tap < c.taps; ++tap) {
      for (int64_t channel = 0; channel < c.inputs; channel += kChannels) {
        const int64_t columns = smaller(kChannels, c.inputs - channel);
        load(tap, channel, columns);
        float* out = sums;
        for (int64_t i = row.first; i < row.last; ++i) {
          const Packed& packed = *c.adapters[i].packed;
          const int64_t blocks = blocks_of(packed);
          const float* down =
              packed.down + (tap * blocks * channels_of_panel(c) + channel) * kLanes;
          shrink_blocks<kWide>(down, 0, blocks, columns, out, tap + channel == 0);
          out += blocks * kTokens * kLanes;
        }
      }
    }
  }

  // h = scale * x A^T with the ranks that there are in a row; returns how many.
  int64_t gather() {
    int64_t ranks = 0;
    const float* from = sums;
    for (int64_t i = row.first; i < row.last; ++i) {
      const Packed& packed = *c.adapters[i].packed;
      const V scale = I::splat(c.adapters[i].scale);
      for (int64_t r = 0; r < packed.rank; r += kLanes, from += kTokens * kLanes) {
        // What is past the last rank is overwritten by the next adapter's.
        for (int64_t t = 0; t < tokens; t += kLanes) {
          transpose_to<I>({from + t * kLanes, kLanes}, kLanes, h + (ranks + r) * kTokens + t,
                          kTokens);
        }
      }
      for (int64_t r = 0; r < packed.rank; ++r) {
        float* const scaled = h + (ranks + r) * kTokens;
        for (int64_t t = 0; t < tokens; t += kLanes) {
          I::store(scaled + t, I::mul(I::load(scaled + t), scale));
        }
        rows[ranks + r] = packed.up + r * output_pitch(c);
      }
      ranks += packed.rank;
    }
    return ranks;
  }

  // sums = h B of N vectors of outputs and M tokens.
  template <int N, int M>
  HEATSINK_INLINE void expand_tile(int64_t output, int64_t t, int64_t ranks) {
    const int64_t size = size_of(c.element);
    const int64_t step = c.y_token * size;
    char* const y = c.y + (row.row * c.y_row + (first + t) * c.y_token + output) * size;
    if (c.y_output == 1) {
      // It comes while the products are taken.
#pragma GCC unroll 24
      for (int i = 0; i < M * N; ++i) {
        __builtin_prefetch(y + i / N * step + i % N * kLanes * size, 1);
      }
    }
    V dot[M * N];
#pragma GCC unroll 24
    for (int i = 0; i < M * N; ++i) {
      dot[i] = I::splat(0.0f);
    }
    const float* from = h + t;
    for (int64_t r = 0; r < ranks; ++r) {
      const float* up = rows[r] + output;
      V b[N];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        b[v] = I::load(up + v * kLanes);
      }
#pragma GCC unroll 24
      for (int j = 0; j < M * N; ++j) {
        dot[j] = I::fma(b[j % N], I::splat(from[j / N]), dot[j]);
      }
      from += kTokens;
    }
#pragma GCC unroll 24
    for (int i = 0; i < M * N; ++i) {
      I::store(sums + (i % N * kTokens + t + i / N) * kLanes, dot[i]);
    }
  }

  template <int N, int M>
  HEATSINK_INLINE void expand_tiles(int64_t output, int64_t t, int64_t ranks) {
    for (; t + M <= tokens; t += M) {
      expand_tile<N, M>(output, t, ranks);
    }
    if constexpr (M > 1) {
      expand_tiles<N, M / 2>(output, t, ranks);
    }
  }

  // y += sums of one vector of outputs.
  void add(int64_t output, const float* from) {
    const int64_t outputs = smaller(kLanes, c.outputs - output);
    const int64_t size = size_of(c.element);
    char* const y = c.y + (row.row * c.y_row + first * c.y_token + output * c.y_output) * size;
    if (c.y_output == 1) {
      for (int64_t t = 0; t < tokens; ++t) {
        add_to<I>(c.element, I::load(from + t * kLanes), y + t * c.y_token * size, 1, outputs);
      }
      return;
    }
    for (int64_t t = 0; t < tokens; t += kLanes) {
      transpose_to<I>({from + t * kLanes, kLanes}, kLanes, turned, kLanes);
      for (int64_t o = 0; o < outputs; ++o) {
        add_to<I>(c.element, I::load(turned + o * kLanes),
                  y + (t * c.y_token + o * c.y_output) * size, c.y_token,
                  smaller(kLanes, tokens - t));
      }
    }
  }

  template <int N>
  void expand(int64_t output, int64_t ranks) {
    const int64_t end = round_up(c.outputs, kLanes);
    for (; output + N * kLanes <= end; output += N * kLanes) {
      expand_tiles<N, tokens_beside(N)>(output, 0, ranks);
      for (int64_t v = 0; v < N; ++v) {
        add(output + v * kLanes, sums + v * kTokens * kLanes);
      }
    }
    if constexpr (N > 1) {
      expand<N / 2>(output, ranks);
    }
  }

  void run() {
    shrink();
    expand<kWide>(0, gather());
  }
};

template <typename I>
void run_lora_rows(const LoraRows& c, LoraStep step, int64_t begin, int64_t end, float* scratch) {
  const int64_t chunks = (c.tokens + c.chunk - 1) / c.chunk;
  for (int64_t item = begin; item < end; ++item) {
    if (step == LoraStep::Pack) {
      const Packed& slot = c.packed[item / (c.taps + 1)];
      const int64_t tap = item % (c.taps + 1);
      if (tap < c.taps) {
        pack_down<I>(c, slot, tap, scratch);
      } else {
        pack_up<I>(c, slot);
      }
    } else if (step == LoraStep::Image) {
      const int64_t line = item % c.height;
      const int64_t place = item / c.height;
      float* const out = c.image + item * c.width * image_pitch(c);
      turn_line<I>(c, c.rows[place].row, line, out, scratch);
    } else {
      LoraTask<I>(c, item / chunks, item % chunks, scratch).run();
    }
  }
}

}  // namespace
}  // namespace heatsink
