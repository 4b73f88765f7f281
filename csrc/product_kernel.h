// The product's kernel, for a set of vector operations `I`; included once for every set.
//
// The 16 lanes of a vector are 16 columns of W, so that an element of the result is summed in its
// lane, product by product: it depends on its row of A and its row of W alone, and is the same for
// every width of register.
//
// No standard header here: the instruction set may be raised where this is included. All of it has
// internal linkage for the same reason.
#pragma once

#include "interface.h"
#include "product.h"
#include "product_epilogue.h"
#include "product_rows.h"

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

template <typename I>
struct Float : I {
  static constexpr bool kBfloat16 = false;
  static constexpr bool kPrefetches = false;
  static constexpr int64_t kRows = I::kFloatRows;
  static constexpr int64_t kGranule = 1;  // rows that must be there in memory are a multiple
  static int64_t steps(int64_t depth) { return ceil_div(depth, kSum); }
  static void multiply(int64_t rows, const char* a, int64_t pitch, const char* b, int64_t width,
                       int64_t depth, float* c, bool first, Aside<Float>& aside) {
    aside.finish();
    for (int64_t k = 0; k < depth; k += kSum, a += 4 * kSum, b += 4 * kSum * width) {
      const int64_t some = depth - k < kSum ? depth - k : kSum;
      multiply_rows<I, false, I::kFloatRows>(rows, a, pitch, b, width, some, c, first && k == 0);
      aside.fetch_some();
    }
  }
};

template <typename I>
struct Bfloat16Pairs : I {
  static constexpr bool kBfloat16 = true;
  static constexpr bool kPrefetches = false;
  static constexpr int64_t kRows = I::kPairRows;
  static constexpr int64_t kGranule = 1;
  static int64_t steps(int64_t) { return 1; }
  static void multiply(int64_t rows, const char* a, int64_t pitch, const char* b, int64_t width,
                       int64_t depth, float* c, bool first, Aside<Bfloat16Pairs>& aside) {
    aside.finish();
    multiply_rows<I, true, I::kPairRows>(rows, a, pitch, b, width, depth, c, first);
  }
};

// Asks for rows that are worked on next.
inline void prefetch_rows(const char* from, int64_t rows, int64_t pitch, int64_t bytes) {
  for (int64_t r = 0; r < rows; ++r, from += pitch) {
    for (int64_t line = 0; line < bytes; line += 64) {
      __builtin_prefetch(from + line, 0, 2);
    }
  }
}

// One task: some rows by some panels.
template <typename M>
void run_task(const Product& p, int64_t task, char* scratch) {
  constexpr int64_t kBytes = M::kBfloat16 ? 2 : 4;
  const int64_t row = task % row_tasks(p) * p.task_rows;
  const int64_t rows = p.rows - row < p.task_rows ? p.rows - row : p.task_rows;
  const int64_t panel = task / row_tasks(p) * p.task_panels;
  const int64_t left = panels(p) - panel;
  const int64_t last_panel = panel + (left < p.task_panels ? left : p.task_panels);
  const int64_t step = round_up(ceil_div(rows, ceil_div(rows, M::kRows)), M::kGranule);
  const int64_t padded_rows = round_up(rows, M::kGranule);
  const int64_t depth = packed_depth(M::kBfloat16, p.depth);
  float* sums = reinterpret_cast<float*>(scratch + kCopyBytes);
  float* other = sums + kBlockRows * kPanel;
  const bool geglu = p.activation == Activation::Geglu;
  const bool single = depth <= p.task_depth;
  Aside<M> aside{p};
  for (int64_t k = 0; k < depth; k += p.task_depth) {
    const int64_t count = depth - k < p.task_depth ? depth - k : p.task_depth;
    for (int64_t i = 0; i < rows; i += step) {
      const int64_t some = rows - i < step ? rows - i : step;
      const int64_t there = p.depth - k < count ? p.depth - k : count;
      int64_t pitch;
      const char* a = there == count && some % M::kGranule == 0
                          ? rows_in_place(p, row + i, some, k, count, &pitch)
                          : nullptr;
      if (a == nullptr) {
        pitch = pitch_of(p);
        a = scratch;
        gather(p, row + i, some, k, there, count, scratch);
      }
      const bool ahead = M::kPrefetches && p.direct && i + step < rows;
      const int64_t ahead_rows = ceil_div(step, last_panel - panel);
      for (int64_t n = panel; n < last_panel; ++n) {
        if (ahead) {
          prefetch_rows(a + (step + (n - panel) * ahead_rows) * pitch, ahead_rows, pitch,
                        count * kBytes);
        }
        const int64_t width = panel_width(geglu, p.columns, n);
        const char* b = p.weight + (n * kPanel * depth + k * width) * kBytes;
        if (!single) {
          // This panel's next part, or its first for the rows of the next task.
          const char* next =
              k + count < depth ? b + count * width * kBytes : b - k * width * kBytes;
          const int64_t share = round_up(ceil_div(p.task_depth * width * kBytes * step, rows), 64);
          const int64_t done = i / step * share;
          aside.fetch_later(next + done, share, M::steps(count));
        }
        float* c =
            single ? (n % 2 == 0 ? sums : other) : sums + ((n - panel) * padded_rows + i) * kPanel;
        M::multiply(some, a, pitch, b, width, count, c, k == 0, aside);
        if (k + count == depth) {
          aside.finish_later(row + i, some, n, c);
        }
      }
      aside.finish();
    }
  }
}

}  // namespace
}  // namespace heatsink
