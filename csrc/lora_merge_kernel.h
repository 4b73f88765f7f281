// The merge of low-rank terms into weights, for a set of vector operations `I`; included once for
// every set.
//
// For an element: delta = fma(b_k, a_k, delta) over all k of the first term, then of the next, from
// 0; result = fma(value, factor, delta), rounded to the weight's dtype. b holds the term's scale
// and, with a magnitude, the row's gain; factor is 1 + the sum of (gain - 1). Nothing depends on
// how a weight is cut into tasks, nor on the registers' width: each operation is one IEEE
// operation.
//
// A row's gain is magnitude / sqrt(sum of (value + delta)^2) of that term's delta alone. Squares
// are summed by lanes: column n goes to lane n mod 16, in order of n; then lane j takes lane j + 8,
// then + 4, + 2, + 1.
//
// No standard header here: the instruction set may be raised where this is included. All of it has
// internal linkage for the same reason.

#pragma once

#include "interface.h"
#include "lora_merge.h"
#include "lora_merge_values.h"

namespace heatsink {
namespace {

constexpr int64_t kAhead = 4 * kPanel;

// How the results of a panel are written: as many as there are, whole vectors, or whole vectors
// past the caches.
enum class Write { Part, Whole, Stream };

// A term as a group of rows needs it: where each row's values of B are, with scale and gain.
struct Segment {
  const float* a;
  const float* b[kMostRows];
  int64_t rank;
};
static_assert(sizeof(Segment) == kSegmentFloats * sizeof(float));

// Where the thread keeps what it knows of a group of rows.
struct GroupScratch {
  Segment* segments;
  float *factor, *gain, *zeros, *b;

  GroupScratch(const MergeWeight& weight, float* memory) {
    const int64_t terms = weight.last_term - weight.first_term;
    segments = reinterpret_cast<Segment*>(memory);
    factor = memory + terms * kSegmentFloats;
    gain = factor + kMostRows;
    zeros = gain + terms * kMostRows;
    b = zeros + weight.ranks;
    for (int64_t i = 0; i < kMostRows; ++i) {
      factor[i] = 1.0f;
    }
    for (int64_t k = 0; k < weight.ranks; ++k) {
      zeros[k] = 0.0f;
    }
  }
};

// A group of rows: `I::kRows` of them, the last one repeated where there are fewer.
template <typename I>
struct Group {
  const char* from[I::kRows];
  char* to[I::kRows];
  int64_t row[I::kRows];
};

// Asks for the values `kAhead` columns further on: the sums take so long that the processor does
// not look that far. At the end of the rows these are the next rows'.
template <typename I, typename E>
HEATSINK_INLINE void prefetch(const Group<I>& group, int64_t column, int64_t first, int64_t last,
                              int64_t pitch) {
  int64_t ahead = column + kAhead;
  if (ahead >= last) {
    ahead += first - last + I::kRows * pitch;
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < I::kRows; ++i) {
#pragma GCC unroll 2
    for (int64_t byte = 0; byte < I::kVectors * kLanes * E::kBytes; byte += 64) {
      __builtin_prefetch(group.from[i] + ahead * E::kBytes + byte);
    }
  }
}

// The index of a weight's row in a term, or -1.
inline int64_t place_in(const MergeTerm& term, int64_t row) {
  const int64_t distance = row - term.row;
  // Division is slow, and hardly ever needed.
  const int64_t place = term.step == 1 ? distance : distance / term.step;
  const bool there = distance >= 0 && place < term.count && place * term.step == distance;
  return there ? place : -1;
}

// Finds B's rows for the group: zeros where the term has no row. With gains they are multiplied
// into `b`, which is moved on. Returns whether the term has any of the rows.
template <typename I>
bool find_rows(const MergeTerm& term, const Group<I>& group, const GroupScratch& scratch,
               const float* gain, float*& b, Segment& out) {
  bool any = false;
  out.a = term.a;
  out.rank = term.rank;
  for (int64_t i = 0; i < I::kRows; ++i) {
    const int64_t place = place_in(term, group.row[i]);
    any |= place >= 0;
    out.b[i] = place < 0 ? scratch.zeros : term.b + place * term.rank;
    if (place >= 0 && gain != nullptr) {
      for (int64_t k = 0; k < term.rank; ++k) {
        b[k] = out.b[i][k] * gain[i];
      }
      out.b[i] = b;
      b += term.rank;
    }
  }
  return any;
}

// The sums of a part of a panel, `I::kVectors` vectors of it: begun at 0 and carried from term to
// term.
template <typename I>
struct Sums {
  typename I::V at[I::kRows][I::kVectors];

  HEATSINK_INLINE void clear() {
#pragma GCC unroll 8
    for (int64_t i = 0; i < I::kRows; ++i) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < I::kVectors; ++v) {
        at[i][v] = I::splat(0.0f);
      }
    }
  }

  HEATSINK_INLINE void add(const Segment& segment, int64_t column) {
    const int64_t rank = segment.rank;
    const float* a = segment.a + column / kPanel * rank * kPanel + column % kPanel;
    const float* b[I::kRows];
    for (int64_t i = 0; i < I::kRows; ++i) {
      b[i] = segment.b[i];
    }
    for (int64_t k = 0; k < rank; ++k, a += kPanel) {
      typename I::V columns[I::kVectors];
#pragma GCC unroll 2
      for (int64_t v = 0; v < I::kVectors; ++v) {
        columns[v] = I::load(a + v * kLanes);
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < I::kRows; ++i) {
        const typename I::V value = I::splat(b[i][k]);
#pragma GCC unroll 2
        for (int64_t v = 0; v < I::kVectors; ++v) {
          at[i][v] = I::fma(value, columns[v], at[i][v]);
        }
      }
    }
  }
};

// Writes a part of a panel: `column` on, `left` columns to the row's end.
template <typename I, typename E, Write kWrite>
HEATSINK_INLINE void finish(const Group<I>& group, const Sums<I>& sums, const float* factor,
                            int64_t column, int64_t left) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < I::kRows; ++i) {
    const typename I::V of_row = I::splat(factor[i]);
#pragma GCC unroll 2
    for (int64_t v = 0; v < I::kVectors; ++v) {
      const int64_t at = (column + v * kLanes) * E::kBytes;
      const char* from = group.from[i] + at;
      char* to = group.to[i] + at;
      if (kWrite == Write::Part) {
        const int64_t count = clamped(left - v * kLanes);
        if (count > 0) {
          const typename I::V value = load_part<I, E>(from, count);
          store_part<I, E>(to, count, I::fma(value, of_row, sums.at[i][v]));
        }
        continue;
      }
      const typename I::V result = I::fma(E::load(from), of_row, sums.at[i][v]);
      if (kWrite == Write::Stream) {
        alignas(64) char line[kLanes * 4];
        E::store(line, result);
        I::stream(line, to, E::kBytes * kLanes);
      } else {
        E::store(to, result);
      }
    }
  }
}

// squares[i][lane] += (value + sums)^2 of a part of a panel.
template <typename I, typename E>
HEATSINK_INLINE void add_squares(const Group<I>& group, const Sums<I>& sums, int64_t column,
                                 int64_t left, float* squares) {
  for (int64_t i = 0; i < I::kRows; ++i) {
    typename I::V total = I::load(squares + i * kLanes);
    for (int64_t v = 0; v < I::kVectors; ++v) {
      const int64_t count = clamped(left - v * kLanes);
      const char* from = group.from[i] + (column + v * kLanes) * E::kBytes;
      if (count > 0) {
        const typename I::V value = I::add(load_part<I, E>(from, count), sums.at[i][v]);
        total = I::fma(value, value, total);
      }
    }
    I::store(squares + i * kLanes, total);
  }
}

inline float sum_lanes(float* lanes) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) {
      lanes[j] += lanes[j + half];
    }
  }
  return lanes[0];
}

// Every gain of the group's rows, and their factors.
template <typename I, typename E>
void find_gains(const Merge& merge, const MergeWeight& weight, const Group<I>& group,
                const GroupScratch& scratch) {
  for (int64_t i = 0; i < I::kRows; ++i) {
    scratch.factor[i] = 1.0f;
  }
  float* gain = scratch.gain;
  for (int64_t t = weight.first_term; t < weight.last_term; ++t, gain += I::kRows) {
    const MergeTerm& term = merge.terms[t];
    if (term.magnitude == nullptr) {
      continue;
    }
    Segment segment;
    float* unused = nullptr;
    if (!find_rows<I>(term, group, scratch, nullptr, unused, segment)) {
      continue;
    }
    alignas(64) float squares[I::kRows * kLanes] = {};
    for (int64_t column = 0; column < weight.columns; column += I::kVectors * kLanes) {
      Sums<I> sums;
      sums.clear();
      sums.add(segment, column);
      add_squares<I, E>(group, sums, column, weight.columns - column, squares);
    }
    for (int64_t i = 0; i < I::kRows; ++i) {
      const int64_t place = place_in(term, group.row[i]);
      const float norm = __builtin_sqrtf(sum_lanes(squares + i * kLanes));
      gain[i] = place < 0 ? 1.0f : term.magnitude[place] / norm;
      scratch.factor[i] += gain[i] - 1.0f;
    }
  }
}

// The task's columns of a group of rows.
template <typename I, typename E, Write kWrite>
void merge_columns(const MergeWeight& weight, const MergeTask& task, const Group<I>& group,
                   const GroupScratch& scratch, const Segment* end) {
  constexpr int64_t kStep = I::kVectors * kLanes;
  for (int64_t column = task.column; column < task.last_column; column += kStep) {
    prefetch<I, E>(group, column, task.column, task.last_column, weight.columns);
    Sums<I> sums;
    sums.clear();
    for (const Segment* s = scratch.segments; s < end; ++s) {
      sums.add(*s, column);
    }
    const int64_t left = weight.columns - column;
    if (left >= kStep) {
      finish<I, E, kWrite>(group, sums, scratch.factor, column, left);
    } else {
      finish<I, E, Write::Part>(group, sums, scratch.factor, column, left);
    }
  }
}

// The task's part of a group of rows.
template <typename I, typename E>
void merge_group(const Merge& merge, const MergeWeight& weight, const MergeTask& task,
                 const Group<I>& group, const GroupScratch& scratch) {
  if (weight.magnitude) {
    find_gains<I, E>(merge, weight, group, scratch);
  }
  Segment* end = scratch.segments;
  float* b = scratch.b;
  const float* gain = scratch.gain;
  for (int64_t t = weight.first_term; t < weight.last_term; ++t, gain += I::kRows) {
    const MergeTerm& term = merge.terms[t];
    const float* of_term = term.magnitude == nullptr ? nullptr : gain;
    if (find_rows<I>(term, group, scratch, of_term, b, *end)) {
      ++end;
    }
  }
  if (weight.stream) {
    merge_columns<I, E, Write::Stream>(weight, task, group, scratch, end);
  } else {
    merge_columns<I, E, Write::Whole>(weight, task, group, scratch, end);
  }
}

inline bool has_term(const Merge& merge, const MergeWeight& weight, int64_t row) {
  for (int64_t t = weight.first_term; t < weight.last_term; ++t) {
    if (place_in(merge.terms[t], row) >= 0) {
      return true;
    }
  }
  return false;
}

template <typename E>
void copy_row(const MergeWeight& weight, const MergeTask& task, int64_t row) {
  const int64_t at = (row * weight.columns + task.column) * E::kBytes;
  const int64_t bytes = (task.last_column - task.column) * E::kBytes;
  __builtin_memcpy(weight.out + at, weight.base + at, static_cast<uint64_t>(bytes));
}

// Rows with terms are taken together as they come, the others are copied.
template <typename I, typename E>
void merge_task(const Merge& merge, const MergeTask& task, float* memory) {
  const MergeWeight& weight = merge.weights[task.weight];
  const GroupScratch scratch(weight, memory);
  Group<I> group;
  int64_t found = 0;
  for (int64_t row = task.row; row < task.last_row; ++row) {
    if (has_term(merge, weight, row)) {
      group.row[found] = row;
      group.from[found] = weight.base + row * weight.columns * E::kBytes;
      group.to[found] = weight.out + row * weight.columns * E::kBytes;
      ++found;
    } else {
      copy_row<E>(weight, task, row);
    }
    if (found == I::kRows || (found > 0 && row + 1 == task.last_row)) {
      for (int64_t i = found; i < I::kRows; ++i) {
        group.row[i] = group.row[found - 1];
        group.from[i] = group.from[found - 1];
        group.to[i] = group.to[found - 1];
      }
      merge_group<I, E>(merge, weight, task, group, scratch);
      found = 0;
    }
  }
}

template <typename I, Element kElement>
void merge_tasks(const Merge& merge, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) {
    merge_task<I, Values<I, kElement>>(merge, merge.tasks[task], scratch);
  }
  I::fence();
}

template <typename I>
void run_merge(const Merge& merge, int64_t begin, int64_t end, float* scratch) {
  switch (merge.element) {
    case Element::Float:
      return merge_tasks<I, Element::Float>(merge, begin, end, scratch);
    case Element::Half:
      return merge_tasks<I, Element::Half>(merge, begin, end, scratch);
    case Element::BFloat16:
      return merge_tasks<I, Element::BFloat16>(merge, begin, end, scratch);
  }
}

}  // namespace
}  // namespace heatsink
