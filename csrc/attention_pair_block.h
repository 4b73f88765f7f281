// A block of attention for bfloat16: the weights of some queries against some keys, made while
// products are under way. Part of csrc/attention_pairs.h, under its rules.
#pragma once

#include "attention_kernel.h"

namespace heatsink {
namespace {

constexpr int64_t kTileBytes = 2 * kTile * kLanes;

// (2^f - 1) / f for |f| <= 1/2, within 3e-6.
constexpr float kPowerSeries[] = {0x1.3a02ccp-7f, 0x1.c9fc46p-5f, 0x1.ec0378p-3f, 0x1.62e12cp-1f,
                                  1.0f};

// 2^(x factor) for x factor <= 0; exactly 1 for x = 0, exactly 0 unless x > floor; NaN for NaN.
// floor * factor is -125: no result is subnormal.
template <typename I>
HEATSINK_INLINE typename I::V power_of(typename I::V x, typename I::V factor, typename I::V floor) {
  using V = typename I::V;
  const V magic = I::splat(0x1.8p+23f);
  const V shifted = I::fma(x, factor, magic);
  const V f = I::fma(x, factor, I::sub(magic, shifted));
  V y = I::splat(kPowerSeries[0]);
#pragma GCC unroll 4
  for (int i = 1; i < 5; ++i) {
    y = I::fma(y, f, I::splat(kPowerSeries[i]));
  }
  return I::times_power_above(y, shifted, x, floor);
}

// Where a thread keeps what it works on. Queries lie in groups of 32, each in tiles of 32 channels:
// 16 pairs along them by 16 queries, and the same of the other 16 queries.
struct PairScratch {
  char *q, *k, *v, *p;
  float *out, *top, *sum, *scores, *bias, *rows;  // scores and p twice: of two groups in turn
  int64_t depth;                                  // channels, padded with zeros

  PairScratch(const Attention& a, float* memory) : depth(round_up(a.channels, kTile)) {
    q = reinterpret_cast<char*>(memory);
    out = memory + a.chunk * depth / 2;
    top = out + a.chunk * depth;
    sum = top + a.chunk;
    scores = sum + a.chunk;
    p = reinterpret_cast<char*>(scores + 2 * kPairBlock * kPanel);
    k = p + 2 * kPairBlock * kPanel * 2;
    v = k + kPairBlock * pair_pitch(a.channels);
    bias = reinterpret_cast<float*>(v + depth * kPairKeys);
    rows = bias + kPairBlock * kLanes;
  }
  char* group_of_queries(int64_t group) const { return q + group * kPanel * depth * 2; }
  float* scores_of(int64_t group) const { return scores + group % 2 * kPairBlock * kPanel; }
  char* weights_of(int64_t group) const { return p + group % 2 * kPairBlock * kPanel * 2; }
  float* group_of_results(int64_t group) const { return out + group * kPanel * depth; }
};

// One block: up to 32 queries, G vectors of them, against `keys` keys, whose scores are there.
template <typename M, int G>
struct PairBlock {
  using V = typename M::V;
  const Attention& a;
  const PairScratch& s;
  int64_t group, query, key, keys;
  bool scaled;            // the scores are multiplied before anything is added to them
  int64_t done, at_once;  // keys whose weights are there, and that come next
  V top[G], base[G], sum[G];
  V factor, floor;

  HEATSINK_INLINE void find_top() {
    // So many at once that none waits for the one before.
    constexpr int kAtOnce = 4 / G;
    V some[kAtOnce][G];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      some[i / G][i % G] = M::splat(-kInfinity);
    }
    const float* p = s.scores_of(group);
    int64_t j = 0;
    for (; j + kAtOnce <= keys; j += kAtOnce, p += kAtOnce * kPanel) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        V& best = some[i / G][i % G];
        best = M::max(M::load(p + i / G * kPanel + i % G * kLanes), best);
      }
    }
    for (; j < keys; ++j, p += kPanel) {
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) {
        some[0][g] = M::max(M::load(p + g * kLanes), some[0][g]);
      }
    }
#pragma GCC unroll 4
    for (int i = G; i < 4; ++i) {
      some[0][i % G] = M::max(some[i / G][i % G], some[0][i % G]);
    }
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      top[g] = some[0][g];
    }
  }

  // Multiplies by the scale, adds the bias and hides keys that come after the query.
  void mask(const Plane& bias) {
    const V scale = M::splat(a.scale);
    for (int g = 0; g < G; ++g) {
      const int64_t first = query + g * kLanes;
      if (bias.data != nullptr) {
        read_rows<M>(bias, first, kLanes, a.queries - 1, key, keys, s.rows, kPairBlock);
        transpose_rows<M>({s.rows, kPairBlock}, keys, 1.0f, s.bias);
      }
      for (int64_t j = 0; j < keys; ++j) {
        float* p = s.scores_of(group) + j * kPanel + g * kLanes;
        V score = M::mul(M::load(p), scale);
        if (bias.data != nullptr) {
          score = M::add(score, M::load(s.bias + j * kLanes));
        }
        const int64_t before = key + j - first;
        if (a.causal && before > 0) {
          score = M::where_below(smaller(before, kLanes), M::splat(-kInfinity), score);
        }
        M::store(p, score);
      }
    }
  }

  // The new maxima; what earlier blocks gave is multiplied to match.
  HEATSINK_INLINE void settle_top() {
    const float power = scaled ? kLog2E : a.scale * kLog2E;
    factor = M::splat(power);
    floor = M::splat(-125.0f / power);
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      float* kept = s.top + group * kPanel + g * kLanes;
      const V before = M::load(kept);
      const V now = M::max(top[g], before);
      M::store(kept, now);
      // With every key hidden so far, the weights shall be 0 and not NaN.
      base[g] = M::where_equal(now, M::splat(-kInfinity), M::splat(0.0f), now);
      sum[g] = M::splat(0.0f);
      if (key == 0) {
        continue;
      }
      const V fade = power_of<M>(M::sub(before, base[g]), factor, floor);
      sum[g] = M::mul(M::load(s.sum + group * kPanel + g * kLanes), fade);
      float* out = s.group_of_results(group) + g * kLanes;
      for (int64_t c = a.channels; c > 0; --c, out += kPanel) {
        M::store(out, M::mul(M::load(out), fade));
      }
    }
  }

  // The weights of `count` keys, some and zeros after them, in pairs.
  HEATSINK_INLINE void weigh(const float* p, int64_t count, int64_t padded, char* to) {
    // Copies, since whatever is stored might otherwise be one of them.
    const V factors = factor, floors = floor;
    V from[G], sums[G];
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      from[g] = base[g];
      sums[g] = sum[g];
    }
    const auto weight_of = [&](const float* score, int g) {
      const V weight = power_of<M>(M::sub(M::load(score), from[g]), factors, floors);
      sums[g] = M::add(sums[g], weight);
      return weight;
    };
    int64_t j = 0;
    for (; j + 1 < count; j += 2, p += 2 * kPanel, to += 4 * kLanes) {
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) {
        const V even = weight_of(p + g * kLanes, g);
        M::join(even, weight_of(p + kPanel + g * kLanes, g), to + g * kTileBytes);
      }
    }
    for (; j < padded; j += 2, to += 4 * kLanes) {
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) {
        const V even = j < count ? weight_of(p + g * kLanes, g) : M::splat(0.0f);
        M::join(even, M::splat(0.0f), to + g * kTileBytes);
      }
    }
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      sum[g] = sums[g];
    }
  }

  // p = e^(scores - maximum), a few keys at a time: while products are under way, which leave the
  // vector units idle.
  void finish_some() {
    if (done < round_up(keys, kTile)) {
      weigh(s.scores_of(group) + done * kPanel, smaller(keys - done, at_once), at_once,
            s.weights_of(group) + done / kTile * G * kTileBytes + done % kTile * 2 * kLanes);
      done += at_once;
    }
  }
  void fetch_some() {}
  void finish() {
    at_once = done % kTile == 0 ? kTile : at_once;
    while (done < round_up(keys, kTile)) {
      finish_some();
    }
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      M::store(s.sum + group * kPanel + g * kLanes, sum[g]);
    }
  }

  // Once the scores are there; the weights follow in so many steps.
  void begin(const Plane& bias, int64_t steps) {
    if (scaled) {
      mask(bias);
    }
    find_top();
    settle_top();
    for (at_once = 2; at_once < kTile && at_once * steps < keys;) {
      at_once *= 2;
    }
  }
};

}  // namespace
}  // namespace heatsink
