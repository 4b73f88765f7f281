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
#include "product_block.h"
#include "product_epilogue.h"
#include "product_rows.h"

namespace heatsink {
namespace {

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
