// The attention kernel, for a set of vector operations `I`; included once for every set.
//
// The 16 lanes of a vector are 16 queries. Scores, maxima and sums of one query stay in its lane
// and are accumulated key by key, channel by channel, so what a query gets depends on nothing but
// that query, the keys and the values, and is the same for every width of register: each operation
// below is one IEEE operation, fma among them.
//
// No standard header here: the instruction set may be raised where this is included. All of it has
// internal linkage for the same reason.
#pragma once

#include "attention.h"
#include "attention_rows.h"
#include "interface.h"

namespace heatsink {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 0x1.715476p+0f;

// Values whose rows lie as far apart as this are copied: such rows share few of a cache's sets, and
// take many pages.
constexpr int64_t kFarRows = 512;

// 2^x for x <= 0; exactly 1 for 0, exactly 0 for -127 and below; NaN for NaN.
template <typename I>
HEATSINK_INLINE typename I::V exp2(typename I::V x) {
  using V = typename I::V;
  x = I::max(I::splat(-127.0f), x);
  // The sum's last bits are x rounded to an integer.
  const V magic = I::splat(0x1.8p+23f);
  const V shifted = I::add(x, magic);
  const V f = I::sub(x, I::sub(shifted, magic));
  V y = I::splat(0x1.41fbc2p-13f);
  constexpr float kSeries[] = {0x1.5f3e52p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f,
                               0x1.ebfbdcp-3f,  0x1.62e430p-1f, 1.0f};
  for (const float c : kSeries) {
    y = I::fma(y, f, I::splat(c));
  }
  return I::times_power(y, shifted);
}

// Where a thread keeps what it works on. `pitch` is the distance of rows of channels.
struct Scratch {
  float *q, *out, *top, *sum, *k, *v, *p, *bias, *rows;
  int64_t pitch;

  Scratch(const Attention& a, float* memory) : pitch(row_pitch(a.channels)) {
    q = memory;
    out = q + a.chunk * pitch;
    k = out + a.chunk * pitch;
    v = k + kKeyBlock * pitch;
    p = v + kKeyBlock * pitch;
    bias = p + 2 * kKeyBlock * kLanes;
    rows = bias + 2 * kKeyBlock * kLanes;
    top = rows + kLanes * (pitch > kKeyBlock ? pitch : kKeyBlock);
    sum = top + a.chunk;
  }
};

// The pieces of one block: G groups of 16 queries against `keys` keys.
template <typename I, int G>
struct Block {
  using V = typename I::V;
  static constexpr int kTile = I::kAccumulators / G;

  const Attention& a;
  const Scratch& s;
  Rows v;
  int64_t group;  // the first of the G, counted in the chunk
  int64_t query;  // the first query, counted in the sequence
  int64_t key;    // the first key
  int64_t keys;
  V top[G];
  V fade[G];

  template <int N>
  static HEATSINK_INLINE void clear(V (&dot)[N]) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      dot[i] = I::splat(0.0f);
    }
  }

  // dot[i][g] += x[g] * y[i] for N numbers y.
  template <int N>
  static HEATSINK_INLINE void multiply(const V (&x)[G], const float* y, V (&dot)[N * G]) {
#pragma GCC unroll 16
    for (int i = 0; i < N * G; ++i) {
      dot[i] = I::fma(x[i % G], I::splat(y[i / G]), dot[i]);
    }
  }

  // p[j][g] = q . k_j for N keys, of channels begin..end-1 added to those before; after the last
  // ones, also the largest of them.
  template <int N>
  HEATSINK_INLINE void score_tile(int64_t first, int64_t begin, int64_t end) {
    const float* const q = s.q + group * s.pitch * kLanes;
    // Keys lie in groups of 16 too, of which a tile never holds more than one.
    const float* const k = s.k + first / kLanes * s.pitch * kLanes + first % kLanes;
    float* const p = s.p + first * G * kLanes;
    const int64_t next = s.pitch * kLanes;
    V dot[N * G];
    clear(dot);
    for (int64_t c = begin; c < end; ++c) {
      V row[G];
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) {
        row[g] = I::load(q + g * next + c * kLanes);
      }
      multiply<N>(row, k + c * kLanes, dot);
    }
    if (begin != 0) {
#pragma GCC unroll 16
      for (int i = 0; i < N * G; ++i) {
        dot[i] = I::add(I::load(p + i * kLanes), dot[i]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < N * G; ++i) {
      I::store(p + i * kLanes, dot[i]);
    }
    if (end == a.channels) {
#pragma GCC unroll 16
      for (int i = 0; i < N * G; ++i) {
        top[i % G] = I::max(dot[i], top[i % G]);
      }
    }
  }

  // Tiles of N keys, then of half as many, and so on.
  template <int N>
  HEATSINK_INLINE void score_tiles(int64_t first, int64_t begin, int64_t end) {
    for (; first + N <= keys; first += N) {
      score_tile<N>(first, begin, end);
    }
    if constexpr (N > 1) {
      score_tiles<N / 2>(first, begin, end);
    }
  }

  // A block of channels of the queries stays in the nearest cache while all keys pass by.
  HEATSINK_INLINE void scores() {
    for (int g = 0; g < G; ++g) {
      top[g] = I::splat(-kInfinity);
    }
    for (int64_t begin = 0; begin < a.channels; begin += kChannelBlock) {
      score_tiles<kTile>(0, begin, smaller(begin + kChannelBlock, a.channels));
    }
  }

  // Adds the bias and hides keys that come after the query; the maxima are found again.
  void mask(const Plane& bias) {
    for (int g = 0; g < G; ++g) {
      const int64_t first = query + g * kLanes;
      if (bias.data != nullptr) {
        read_rows<I>(bias, first, kLanes, a.queries - 1, key, keys, s.rows, kKeyBlock);
        transpose_rows<I>({s.rows, kKeyBlock}, keys, 1.0f, s.bias);
      }
      top[g] = I::splat(-kInfinity);
      for (int64_t j = 0; j < keys; ++j) {
        float* p = s.p + (j * G + g) * kLanes;
        V score = I::load(p);
        if (bias.data != nullptr) {
          score = I::add(score, I::load(s.bias + j * kLanes));
        }
        const int64_t before = key + j - first;
        if (a.causal && before > 0) {
          score = I::where_below(smaller(before, kLanes), I::splat(-kInfinity), score);
        }
        I::store(p, score);
        top[g] = I::max(score, top[g]);
      }
    }
  }

  // e^x for x <= 0.
  static HEATSINK_INLINE V power(V x) { return exp2<I>(I::mul(x, I::splat(kLog2E))); }

  // p = e^(p - maximum); `fade` is what earlier blocks are multiplied by.
  HEATSINK_INLINE void weights() {
    V base[G];
    V sum[G];
    for (int g = 0; g < G; ++g) {
      float* kept = s.top + (group + g) * kLanes;
      const V before = I::load(kept);
      const V now = I::max(top[g], before);
      I::store(kept, now);
      // With every key hidden so far, the weights shall be 0 and not NaN.
      base[g] = I::where_equal(now, I::splat(-kInfinity), I::splat(0.0f), now);
      fade[g] = power(I::sub(before, base[g]));
      sum[g] = I::splat(0.0f);
    }
    float* p = s.p;
    for (int64_t j = keys; j > 0; --j) {
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) {
        const V weight = power(I::sub(I::load(p), base[g]));
        I::store(p, weight);
        sum[g] = I::add(sum[g], weight);
        p += kLanes;
      }
    }
    for (int g = 0; g < G; ++g) {
      float* kept = s.sum + (group + g) * kLanes;
      I::store(kept, I::fma(I::load(kept), fade[g], sum[g]));
    }
  }

  // out = out * fade + p . v for N channels; the first block finds nothing to add to.
  template <int N>
  HEATSINK_INLINE void value_tile(int64_t first) {
    float* const out = s.out + (group * s.pitch + first) * kLanes;
    const int64_t next = s.pitch * kLanes;
    const int64_t pitch = v.pitch;
    const float* row = v.data + first;
    const float* p = s.p;
    V dot[N * G];
    clear(dot);
    for (int64_t j = keys; j > 0; --j) {
      V weight[G];
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) {
        weight[g] = I::load(p + g * kLanes);
      }
      multiply<N>(weight, row, dot);
      p += G * kLanes;
      row += pitch;
    }
    if (key == 0) {
#pragma GCC unroll 16
      for (int i = 0; i < N * G; ++i) {
        I::store(out + i % G * next + i / G * kLanes, dot[i]);
      }
      return;
    }
    V scale[G];
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      scale[g] = fade[g];
    }
#pragma GCC unroll 16
    for (int i = 0; i < N * G; ++i) {
      float* const kept = out + i % G * next + i / G * kLanes;
      I::store(kept, I::fma(I::load(kept), scale[i % G], dot[i]));
    }
  }

  template <int N>
  HEATSINK_INLINE void values(int64_t first) {
    for (; first + N <= a.channels; first += N) {
      value_tile<N>(first);
    }
    if constexpr (N > 1) {
      values<N / 2>(first);
    }
  }

  void run(const Plane& bias) {
    scores();
    if (bias.data != nullptr || (a.causal && key + keys > query + 1)) {
      mask(bias);
    }
    weights();
    values<kTile>(0);
  }
};

// One chunk of queries of one head of one sample.
template <typename I>
struct Task {
  using V = typename I::V;

  const Attention& a;
  const Scratch& s;
  int64_t sample, head, first, queries;

  int64_t groups() const { return (queries + kLanes - 1) / kLanes; }

  void begin() {
    const Plane q = plane_of(a, a.q, sample, head);
    for (int64_t g = 0; g < groups(); ++g) {
      const Rows rows =
          rows_of<I>(q, first + g * kLanes, kLanes, a.queries - 1, a.channels, s.rows, s.pitch);
      transpose_rows<I>(rows, a.channels, a.scale, s.q + g * s.pitch * kLanes);
      I::store(s.top + g * kLanes, I::splat(-kInfinity));
      I::store(s.sum + g * kLanes, I::splat(0.0f));
    }
  }

  // Brings in a block of keys, and returns where its values are.
  Rows load_keys(int64_t key, int64_t keys) {
    const Plane k = plane_of(a, a.k, sample, head);
    for (int64_t j = 0; j < keys; j += kLanes) {
      const Rows rows = rows_of<I>(k, key + j, kLanes, a.keys - 1, a.channels, s.rows, s.pitch);
      transpose_rows<I>(rows, a.channels, 1.0f, s.k + j * s.pitch);
    }
    const Plane v = plane_of(a, a.v, sample, head);
    if (v.row_stride >= kFarRows) {
      read_rows<I>(v, key, keys, a.keys - 1, 0, a.channels, s.v, s.pitch);
      return {s.v, s.pitch};
    }
    return rows_of<I>(v, key, keys, a.keys - 1, a.channels, s.v, s.pitch);
  }

  template <int G>
  void block(int64_t group, int64_t key, int64_t keys, Rows v, const Plane& bias) {
    Block<I, G>{a, s, v, group, first + group * kLanes, key, keys, {}, {}}.run(bias);
  }

  void attend(int64_t key, int64_t keys, Rows v, const Plane& bias) {
    for (int64_t group = 0; group < groups(); group += 2) {
      const int64_t last = first + (group + 2) * kLanes;
      const int64_t seen = a.causal ? smaller(keys, last - key) : keys;
      if (seen <= 0) {
        continue;
      }
      const bool two = group + 1 < groups();
      if (two && I::kGroups == 2) {
        block<I::kGroups>(group, key, seen, v, bias);
        continue;
      }
      block<1>(group, key, seen, v, bias);
      if (two) {
        block<1>(group + 1, key, seen, v, bias);
      }
    }
  }

  void end() {
    const int64_t channels = a.channels;
    const int64_t pitch = a.out_token;
    for (int64_t g = 0; g < groups(); ++g) {
      const V sum = I::load(s.sum + g * kLanes);
      const V zero = I::splat(0.0f);
      // A query that sees no key gets zeros.
      const V factor = I::where_equal(sum, zero, zero, I::div(I::splat(1.0f), sum));
      const float* columns = s.out + g * s.pitch * kLanes;
      const int64_t row = first + g * kLanes;
      const int64_t place = sample * a.out_batch + row * pitch + head * a.out_head;
      char* out = static_cast<char*>(a.out) + place * size_of(a.element);
      const int64_t rows = smaller(kLanes, queries - g * kLanes);
      if (a.element == Element::Float && channels % 4 == 0 && rows == kLanes) {
        transpose_columns<I>(columns, kLanes, channels, factor, reinterpret_cast<float*>(out),
                             pitch);
        continue;
      }
      transpose_columns<I>(columns, kLanes, channels, factor, s.rows, s.pitch);
      write_rows<I>({s.rows, s.pitch}, rows, channels, a.element, out, pitch);
    }
  }

  void run() {
    Plane bias{nullptr, a.element, 0, 0};
    if (a.bias.data != nullptr) {
      bias = plane_of(a, a.bias, sample, head);
    }
    begin();
    for (int64_t key = 0; key < a.keys; key += kKeyBlock) {
      if (a.causal && key >= first + groups() * kLanes) {
        break;
      }
      const int64_t keys = smaller(kKeyBlock, a.keys - key);
      attend(key, keys, load_keys(key, keys), bias);
    }
    end();
  }
};

template <typename I>
void run_tasks(const Attention& a, int64_t begin, int64_t end, float* memory) {
  const Scratch scratch(a, memory);
  const int64_t chunks = (a.queries + a.chunk - 1) / a.chunk;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % chunks * a.chunk;
    const int64_t head = task / chunks % a.heads;
    const int64_t sample = task / chunks / a.heads;
    const int64_t queries = smaller(a.chunk, a.queries - first);
    Task<I>{a, scratch, sample, head, first, queries}.run();
  }
}

}  // namespace
}  // namespace heatsink
