// Blocks of products in registers, for a set of vector operations `I`; included once for every set.
//
// The 16 lanes of a vector are 16 columns, so that an element of the result is summed in its lane,
// product by product: it is the same for every width of register.
//
// No standard header here: the instruction set may be raised where this is included. All of it has
// internal linkage for the same reason.
#pragma once

#include "interface.h"
#include "lanes.h"
#include "tile.h"

namespace heatsink {
namespace {

// Steps along the depth by which a panel is asked for before it is used.
constexpr int64_t kAhead = 16;

// c (rows x 32) = or += a (R rows, `pitch` bytes apart) times W's panel, V vectors of `width`
// columns: a[r][k] b[k][column], in float32.
template <typename I, int R, int V>
HEATSINK_INLINE void block_float(const char* a, int64_t pitch, const float* b, int64_t width,
                                 int64_t depth, float* c, bool first) {
  typename I::V sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      sums[r][v] = I::splat(0.0f);
    }
  }
  // Rows in threes, so that one register addresses three of them.
  const char* rows[(R + 2) / 3];
#pragma GCC unroll 5
  for (int r = 0; r < (R + 2) / 3; ++r) {
    rows[r] = a + 3 * r * pitch;
  }
  for (int64_t k = 0; k < depth; ++k, b += width) {
    typename I::V column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      column[v] = I::load(b + v * kLanes);
      __builtin_prefetch(b + kAhead * width + v * kLanes, 0, 3);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename I::V x =
          I::splat(*reinterpret_cast<const float*>(rows[r / 3] + (r % 3) * pitch + 4 * k));
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        sums[r][v] = I::fma(x, column[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = c + r * kPanel + v * kLanes;
      I::store(to, first ? sums[r][v] : I::add(I::load(to), sums[r][v]));
    }
  }
}

// The same of bfloat16: W's panel lies in tiles of 16 pairs along the depth by 16 columns.
template <typename I, int R, int V>
HEATSINK_INLINE void block_bfloat16(const char* a, int64_t pitch, const char* b, int64_t width,
                                    int64_t depth, float* c, bool first) {
  for (int64_t k = 0; k < depth; k += kTile, b += kTile * width * 2) {
    typename I::V even[R][V], odd[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        even[r][v] = odd[r][v] = I::splat(0.0f);
      }
    }
    for (int64_t pair = 0; pair < kTile / 2; ++pair) {
      typename I::V even_column[V], odd_column[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        I::split(b + (v * kTile / 2 + pair) * 4 * kLanes, even_column[v], odd_column[v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        typename I::V x, y;
        I::split_splat(a + r * pitch + 2 * k + 4 * pair, x, y);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          even[r][v] = I::fma(x, even_column[v], even[r][v]);
          odd[r][v] = I::fma(y, odd_column[v], odd[r][v]);
        }
      }
    }
    const bool fresh = first && k == 0;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* to = c + r * kPanel + v * kLanes;
        I::store(to, I::add(fresh ? I::splat(0.0f) : I::load(to), I::add(even[r][v], odd[r][v])));
      }
    }
  }
}

// Blocks of 1 to R rows, of one dtype.
template <typename I, bool kBfloat16, int R>
inline void multiply_rows(int64_t rows, const char* a, int64_t pitch, const char* b, int64_t width,
                          int64_t depth, float* c, bool first) {
  if constexpr (R > 1) {
    if (rows < R) {
      multiply_rows<I, kBfloat16, R - 1>(rows, a, pitch, b, width, depth, c, first);
      return;
    }
  }
  constexpr int64_t kBytes = kBfloat16 ? 2 * kTile : 4;
  int64_t v = 0;
  if constexpr (I::kVectors == 2) {
    if (width == kPanel) {
      if constexpr (kBfloat16) {
        block_bfloat16<I, R, 2>(a, pitch, b, width, depth, c, first);
      } else {
        block_float<I, R, 2>(a, pitch, reinterpret_cast<const float*>(b), width, depth, c, first);
      }
      return;
    }
  }
  for (; v < width; v += kLanes, b += kBytes * kLanes, c += kLanes) {
    if constexpr (kBfloat16) {
      block_bfloat16<I, R, 1>(a, pitch, b, width, depth, c, first);
    } else {
      block_float<I, R, 1>(a, pitch, reinterpret_cast<const float*>(b), width, depth, c, first);
    }
  }
}

}  // namespace
}  // namespace heatsink
