// The attention kernel for bfloat16, for a set of operations `M`: vectors, and products of pairs.
// Included once for every set, under attention_kernel.h's rules, which it follows in the rest.
//
// Products are those of csrc/tile.h: of keys, in rows, with queries, in lanes; then of
// values, a channel a row, with the softmax's weights rounded to bfloat16. The weights are summed
// before they are rounded. What a query gets depends on that query, the keys and the values alone.
#pragma once

#include "attention_kernel.h"
#include "attention_pair_block.h"
#include "product_block.h"

namespace heatsink {
namespace {

// Products in vectors, R rows at a time.
template <typename I, int R>
struct VectorPairs : I {
  template <typename Beside>
  static void multiply(int64_t rows, const char* a, int64_t pitch, const char* b, int64_t width,
                       int64_t depth, float* c, bool first, Beside& aside) {
    for (; rows > 0; rows -= R, a += R * pitch, c += R * kPanel) {
      multiply_rows<I, true, R>(smaller(rows, R), a, pitch, b, width, depth, c, first);
    }
    aside.finish_some();
  }
};

// Nothing is done beside a product.
struct Nothing {
  void finish_some() {}
  void fetch_some() {}
};

// 16 rows of channels from row `first` on, as they are, zeros up to `depth`; rows past the last one
// repeat it.
inline void copy_pairs(const Plane& x, int64_t first, int64_t rows, int64_t last, int64_t channels,
                       int64_t depth, char* to, int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r, to += pitch) {
    const char* from = x.data + smaller(first + r, last) * x.row_stride * 2;
    if (x.column_stride == 1) {
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes) {
        __builtin_memcpy(to + 2 * c, from + 2 * c, 2 * kLanes);
      }
      for (; c + 4 <= channels; c += 4) {
        __builtin_memcpy(to + 2 * c, from + 2 * c, 8);
      }
      for (; c < channels; ++c) {
        __builtin_memcpy(to + 2 * c, from + 2 * c, 2);
      }
    } else {
      collect(from, x.column_stride, channels, 2, to);
    }
    if (depth > channels) {
      __builtin_memset(to + 2 * channels, 0, static_cast<std::size_t>(2 * (depth - channels)));
    }
  }
}

// One chunk of queries of one head of one sample.
template <typename M>
struct PairTask {
  using V = typename M::V;

  const Attention& a;
  const PairScratch& s;
  int64_t sample, head, first, queries;

  void begin() {
    const Plane q = plane_of(a, a.q, sample, head);
    char* const rows = reinterpret_cast<char*>(s.rows);
    const int64_t pitch = s.depth * 2 + 64;
    for (int64_t i = 0; i < queries; i += kLanes) {
      copy_pairs(q, first + i, kLanes, a.queries - 1, a.channels, s.depth, rows, pitch);
      char* to = s.group_of_queries(i / kPanel);
      // A group that has no other 16 queries is packed without them.
      const int64_t width = i / kPanel * kPanel + kLanes < queries ? kPanel : kLanes;
      to += i % kPanel / kLanes * kTileBytes;
      for (int64_t c = 0; c < s.depth; c += kTile, to += width * kTile * 2) {
        transpose_words<M>(reinterpret_cast<const float*>(rows + 2 * c), pitch / 4, kLanes,
                           reinterpret_cast<float*>(to), kLanes);
      }
      M::store(s.top + i, M::splat(-kInfinity));
      M::store(s.sum + i, M::splat(0.0f));
    }
  }

  // Brings in a block of keys and of values, the latter a channel a row.
  void load_keys(int64_t key, int64_t keys) {
    copy_pairs(plane_of(a, a.k, sample, head), key, keys, a.keys - 1, a.channels, s.depth, s.k,
               pair_pitch(a.channels));
    const Plane v = plane_of(a, a.v, sample, head);
    const int64_t width = round_up(a.channels, kLanes);
    char* const rows = reinterpret_cast<char*>(s.rows);
    // Two keys' channels side by side, 16 times.
    const int64_t pitch = 4 * width + 64;
    alignas(64) char pair[2][2 * kLanes];
    for (int64_t j = 0; j < round_up(keys, kTile); j += kTile) {
      for (int64_t r = 0; r < kLanes; ++r) {
        for (int64_t c = 0; c < width; c += kLanes) {
          const char* from[2];
          for (int64_t odd = 0; odd < 2; ++odd) {
            const int64_t row = j + 2 * r + odd;
            from[odd] = v.data + ((key + row) * v.row_stride + c * v.column_stride) * 2;
            if (row >= keys || c + kLanes > a.channels || v.column_stride != 1) {
              __builtin_memset(pair[odd], 0, sizeof pair[odd]);
              if (row < keys) {
                collect(from[odd], v.column_stride, smaller(kLanes, a.channels - c), 2, pair[odd]);
              }
              from[odd] = pair[odd];
            }
          }
          M::interleave(from[0], from[1], rows + r * pitch + 4 * c);
        }
      }
      transpose_words<M>(reinterpret_cast<const float*>(rows), pitch / 4, width,
                         reinterpret_cast<float*>(s.v + 2 * j), kPairKeys / 4);
    }
  }

  // Of a group of queries, how many keys of a block it sees.
  int64_t seen(int64_t group, int64_t key, int64_t keys) const {
    if (group < 0 || group * kPanel >= queries) {
      return 0;
    }
    const int64_t last = first + (group + 1) * kPanel;
    return a.causal ? smaller(keys, last - key) : keys;
  }

  int64_t width_of(int64_t group) const {
    return group * kPanel + kLanes < queries ? kPanel : kLanes;
  }

  // The scores of `keys` keys, a key a row.
  template <typename Beside>
  HEATSINK_INLINE void score(int64_t group, int64_t keys, Beside& aside) const {
    M::multiply(keys, s.k, pair_pitch(a.channels), s.group_of_queries(group), width_of(group),
                s.depth, s.scores_of(group), true, aside);
  }

  // Adds weights times values, a channel a row.
  template <typename Beside>
  HEATSINK_INLINE void add_values(int64_t group, int64_t key, int64_t keys, Beside& aside) const {
    M::multiply(a.channels, s.v, kPairKeys, s.weights_of(group), width_of(group),
                round_up(keys, kTile), s.group_of_results(group), key == 0, aside);
  }

  // Beside a group's weights come the products of the group before and of the one after.
  template <int G>
  void block(int64_t group, int64_t key, int64_t keys, bool scaled, const Plane& bias) const {
    const int64_t own = seen(group, key, keys);
    const int64_t before = seen(group - 1, key, keys), after = seen(group + 1, key, keys);
    PairBlock<M, G> block{a,  s,  group, first + group * kPanel, key, own, scaled, 0, 0, {}, {},
                          {}, {}, {}};
    block.begin(bias,
                tiles_of(before) * tiles_of(a.channels) + tiles_of(after) * tiles_of(s.depth));
    if (after > 0) {
      score(group + 1, after, block);
    }
    if (before > 0) {
      add_values(group - 1, key, before, block);
    }
    block.finish();
  }

  static int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }

  void attend(int64_t key, int64_t keys, const Plane& bias) const {
    const bool scaled = a.causal || bias.data != nullptr || !(a.scale > 0.0f);
    const int64_t groups = round_up(queries, kPanel) / kPanel;
    int64_t group = 0;
    while (seen(group, key, keys) <= 0) {
      ++group;
    }
    Nothing aside;
    score(group, seen(group, key, keys), aside);
    for (; group < groups; ++group) {
      if (width_of(group) == kPanel) {
        block<2>(group, key, keys, scaled, bias);
      } else {
        block<1>(group, key, keys, scaled, bias);
      }
    }
    add_values(groups - 1, key, seen(groups - 1, key, keys), aside);
  }

  void end() {
    for (int64_t i = 0; i < queries; i += kLanes) {
      const V sum = M::load(s.sum + i);
      const V zero = M::splat(0.0f);
      // A query that sees no key gets zeros.
      const V factor = M::where_equal(sum, zero, zero, M::div(M::splat(1.0f), sum));
      const float* columns = s.group_of_results(i / kPanel) + i % kPanel;
      const int64_t place = sample * a.out_batch + (first + i) * a.out_token + head * a.out_head;
      const int64_t pitch = round_up(a.channels, kLanes) + kLanes;
      transpose_columns<M>(columns, kPanel, a.channels, factor, s.rows, pitch);
      write_rows<M>({s.rows, pitch}, smaller(kLanes, queries - i), a.channels, a.element,
                    static_cast<char*>(a.out) + place * 2, a.out_token);
    }
  }

  void run() {
    Plane bias{nullptr, a.element, 0, 0};
    if (a.bias.data != nullptr) {
      bias = plane_of(a, a.bias, sample, head);
    }
    begin();
    for (int64_t key = 0; key < a.keys; key += kPairBlock) {
      if (a.causal && key >= first + round_up(queries, kPanel)) {
        break;
      }
      const int64_t keys = smaller(kPairBlock, a.keys - key);
      load_keys(key, keys);
      attend(key, keys, bias);
    }
    end();
  }
};

template <typename M>
void run_pairs(const Attention& a, int64_t begin, int64_t end, float* memory) {
  const PairScratch scratch(a, memory);
  const int64_t chunks = (a.queries + a.chunk - 1) / a.chunk;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % chunks * a.chunk;
    const int64_t head = task / chunks % a.heads;
    const int64_t sample = task / chunks / a.heads;
    const int64_t queries = smaller(a.chunk, a.queries - first);
    PairTask<M>{a, scratch, sample, head, first, queries}.run();
  }
}

}  // namespace
}  // namespace heatsink
