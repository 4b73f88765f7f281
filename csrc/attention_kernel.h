// The attention kernel, for a set of vector operations `I`; included once for every set.
//
// The 16 lanes of a vector are 16 queries. Scores, maxima and sums of one query stay in its lane
// and are accumulated key by key, channel by channel, so what a query gets depends on nothing but
// that query, the keys and the values, and is the same for every width of register: each operation
// below is one IEEE operation, fma among them.
//
// No include here but attention.h: the instruction set may be raised where this is included. All
// of it has internal linkage for the same reason.
#pragma once

#include "attention.h"
#include "interface.h"

namespace heatsink {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 0x1.715476p+0f;

template <typename To, typename From>
HEATSINK_INLINE To bits_as(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

struct Float {
  using Stored = float;
  static HEATSINK_INLINE float widen(float x) { return x; }
  static HEATSINK_INLINE float narrow(float x) { return x; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static HEATSINK_INLINE float widen(uint16_t x) { return bits_as<float>(uint32_t{x} << 16); }
  static HEATSINK_INLINE uint16_t narrow(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
};

struct Half {
  using Stored = uint16_t;
  static HEATSINK_INLINE float widen(uint16_t x) {
    const uint32_t magnitude = x & 0x7FFFu;
    const uint32_t rebias = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;
    const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    const uint32_t normal = (magnitude << 13) + rebias;
    const uint32_t bits = magnitude < 0x400u ? bits_as<uint32_t>(small) : normal;
    return bits_as<float>(bits | (x & 0x8000u) << 16);
  }
  static HEATSINK_INLINE uint16_t narrow(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    // One half's last place is that of subnormal fp16, so the addition does the rounding.
    const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? small : normal;
    half = magnitude >= 0x477FF000u ? 0x7C00u : half;
    half = magnitude > 0x7F800000u ? 0x7E00u : half;
    return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
  }
};

template <typename F>
HEATSINK_INLINE void with_element(Element element, F f) {
  switch (element) {
    case Element::Float:
      return f(Float{});
    case Element::Half:
      return f(Half{});
    case Element::BFloat16:
      return f(BFloat16{});
  }
}

HEATSINK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One head of one sample of an operand.
struct Plane {
  const char* data;
  Element element;
  int64_t row_stride, column_stride;
};

inline Plane plane_of(const Attention& a, const Operand& x, int64_t sample, int64_t head) {
  const int64_t size = a.element == Element::Float ? 4 : 2;
  const int64_t first = (sample * x.batch + head * x.head) * size;
  return {static_cast<const char*>(x.data) + first, a.element, x.token, x.channel};
}

// out[r][c] = x[first + r][column + c] in float. Rows past the last one repeat it.
inline void read_rows(const Plane& x, int64_t first, int64_t rows, int64_t last, int64_t column,
                      int64_t columns, float* out, int64_t pitch) {
  with_element(x.element, [&](auto type) {
    using Type = decltype(type);
    const auto* data = reinterpret_cast<const typename Type::Stored*>(x.data);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = smaller(first + r, last);
      const auto* __restrict from = data + row * x.row_stride + column * x.column_stride;
      float* __restrict to = out + r * pitch;
      if (x.column_stride == 1) {
        for (int64_t c = 0; c < columns; ++c) {
          to[c] = Type::widen(from[c]);
        }
      } else {
        for (int64_t c = 0; c < columns; ++c) {
          to[c] = Type::widen(from[c * x.column_stride]);
        }
      }
    }
  });
}

// out[c][lane] = factor * rows[lane][c] for 16 rows.
template <typename I>
void transpose_rows(const float* rows, int64_t pitch, int64_t columns, float factor, float* out) {
  const typename I::V scale = I::splat(factor);
  for (int64_t c = 0; c < columns; c += 4) {
    typename I::V a[4];
    for (int64_t r = 0; r < 4; ++r) {
      a[r] = I::gather(rows + r * pitch + c, pitch);
    }
    I::transpose(a);
    for (int64_t r = 0; r < 4; ++r) {
      I::store(out + (c + r) * kLanes, I::mul(a[r], scale));
    }
  }
}

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
  int64_t group;  // the first of the G, counted in the chunk
  int64_t query;  // the first query, counted in the sequence
  int64_t key;    // the first key
  int64_t keys;
  V top[G];
  V fade[G];

  template <int N>
  static HEATSINK_INLINE void clear(V (&dot)[N][G]) {
    for (int i = 0; i < N; ++i) {
      for (int g = 0; g < G; ++g) {
        dot[i][g] = I::splat(0.0f);
      }
    }
  }

  // p[j][g] = q . k_j for N keys, and the largest of them.
  template <int N>
  HEATSINK_INLINE void score_tile(int64_t first) {
    const float* q = s.q + group * s.pitch * kLanes;
    // Keys lie in groups of 16 too, of which a tile never holds more than one.
    const float* k = s.k + first / kLanes * s.pitch * kLanes + first % kLanes;
    for (int64_t begin = 0; begin < a.channels; begin += kChannelBlock) {
      const int64_t end = smaller(begin + kChannelBlock, a.channels);
      V dot[N][G];
      clear(dot);
      for (int64_t c = begin; c < end; ++c) {
        V row[G];
        for (int g = 0; g < G; ++g) {
          row[g] = I::load(q + (g * s.pitch + c) * kLanes);
        }
        for (int j = 0; j < N; ++j) {
          const V x = I::splat(k[c * kLanes + j]);
          for (int g = 0; g < G; ++g) {
            dot[j][g] = I::fma(row[g], x, dot[j][g]);
          }
        }
      }
      for (int j = 0; j < N; ++j) {
        for (int g = 0; g < G; ++g) {
          float* p = s.p + ((first + j) * G + g) * kLanes;
          const V score = begin == 0 ? dot[j][g] : I::add(I::load(p), dot[j][g]);
          I::store(p, score);
          top[g] = end == a.channels ? I::max(score, top[g]) : top[g];
        }
      }
    }
  }

  // Tiles of N keys, then of half as many, and so on.
  template <int N>
  HEATSINK_INLINE void scores(int64_t first) {
    for (; first + N <= keys; first += N) {
      score_tile<N>(first);
    }
    if constexpr (N > 1) {
      scores<N / 2>(first);
    }
  }

  // Adds the bias and hides keys that come after the query; the maxima are found again.
  void mask(const Plane& bias) {
    for (int g = 0; g < G; ++g) {
      const int64_t first = query + g * kLanes;
      if (bias.data != nullptr) {
        read_rows(bias, first, kLanes, a.queries - 1, key, keys, s.rows, kKeyBlock);
        transpose_rows<I>(s.rows, kKeyBlock, keys, 1.0f, s.bias);
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
    for (int64_t j = 0; j < keys; ++j) {
      for (int g = 0; g < G; ++g) {
        float* p = s.p + (j * G + g) * kLanes;
        const V weight = power(I::sub(I::load(p), base[g]));
        I::store(p, weight);
        sum[g] = I::add(sum[g], weight);
      }
    }
    for (int g = 0; g < G; ++g) {
      float* kept = s.sum + (group + g) * kLanes;
      I::store(kept, I::fma(I::load(kept), fade[g], sum[g]));
    }
  }

  // out = out * fade + p . v for N channels.
  template <int N>
  HEATSINK_INLINE void value_tile(int64_t first) {
    float* out = s.out + (group * s.pitch + first) * kLanes;
    const float* v = s.v + first;
    V dot[N][G];
    clear(dot);
    for (int64_t j = 0; j < keys; ++j) {
      V weight[G];
      for (int g = 0; g < G; ++g) {
        weight[g] = I::load(s.p + (j * G + g) * kLanes);
      }
      for (int c = 0; c < N; ++c) {
        const V x = I::splat(v[j * s.pitch + c]);
        for (int g = 0; g < G; ++g) {
          dot[c][g] = I::fma(weight[g], x, dot[c][g]);
        }
      }
    }
    for (int c = 0; c < N; ++c) {
      for (int g = 0; g < G; ++g) {
        float* kept = out + (g * s.pitch + c) * kLanes;
        I::store(kept, I::fma(I::load(kept), fade[g], dot[c][g]));
      }
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
    for (int g = 0; g < G; ++g) {
      top[g] = I::splat(-kInfinity);
    }
    scores<kTile>(0);
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
      read_rows(q, first + g * kLanes, kLanes, a.queries - 1, 0, a.channels, s.rows, s.pitch);
      transpose_rows<I>(s.rows, s.pitch, a.channels, a.scale, s.q + g * s.pitch * kLanes);
      I::store(s.top + g * kLanes, I::splat(-kInfinity));
      I::store(s.sum + g * kLanes, I::splat(0.0f));
      for (int64_t c = 0; c < a.channels; ++c) {
        I::store(s.out + (g * s.pitch + c) * kLanes, I::splat(0.0f));
      }
    }
  }

  void load_keys(int64_t key, int64_t keys) {
    const Plane k = plane_of(a, a.k, sample, head);
    for (int64_t j = 0; j < keys; j += kLanes) {
      read_rows(k, key + j, kLanes, a.keys - 1, 0, a.channels, s.rows, s.pitch);
      transpose_rows<I>(s.rows, s.pitch, a.channels, 1.0f, s.k + j * s.pitch);
    }
    const Plane v = plane_of(a, a.v, sample, head);
    read_rows(v, key, keys, a.keys - 1, 0, a.channels, s.v, s.pitch);
  }

  template <int G>
  void block(int64_t group, int64_t key, int64_t keys, const Plane& bias) {
    Block<I, G>{a, s, group, first + group * kLanes, key, keys, {}, {}}.run(bias);
  }

  void attend(int64_t key, int64_t keys, const Plane& bias) {
    for (int64_t group = 0; group < groups(); group += 2) {
      const int64_t last = first + (group + 2) * kLanes;
      const int64_t seen = a.causal ? smaller(keys, last - key) : keys;
      if (seen <= 0) {
        continue;
      }
      const bool two = group + 1 < groups();
      if (two && I::kGroups == 2) {
        block<I::kGroups>(group, key, seen, bias);
        continue;
      }
      block<1>(group, key, seen, bias);
      if (two) {
        block<1>(group + 1, key, seen, bias);
      }
    }
  }

  void end() {
    for (int64_t g = 0; g < groups(); ++g) {
      const V sum = I::load(s.sum + g * kLanes);
      const V zero = I::splat(0.0f);
      // A query that sees no key gets zeros.
      const V factor = I::where_equal(sum, zero, zero, I::div(I::splat(1.0f), sum));
      for (int64_t c = 0; c < a.channels; c += 4) {
        V x[4];
        for (int64_t i = 0; i < 4; ++i) {
          x[i] = I::mul(I::load(s.out + (g * s.pitch + c + i) * kLanes), factor);
        }
        I::transpose(x);
        for (int64_t i = 0; i < 4; ++i) {
          I::scatter(s.rows + i * s.pitch + c, s.pitch, x[i]);
        }
      }
      write_rows(first + g * kLanes, smaller(kLanes, queries - g * kLanes));
    }
  }

  void write_rows(int64_t row, int64_t rows) {
    with_element(a.element, [&](auto type) {
      using Type = decltype(type);
      auto* out = static_cast<typename Type::Stored*>(a.out);
      for (int64_t r = 0; r < rows; ++r) {
        auto* __restrict to = out + ((sample * a.queries + row + r) * a.heads + head) * a.channels;
        const float* __restrict from = s.rows + r * s.pitch;
        for (int64_t c = 0; c < a.channels; ++c) {
          to[c] = Type::narrow(from[c]);
        }
      }
    });
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
      load_keys(key, keys);
      attend(key, keys, bias);
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
