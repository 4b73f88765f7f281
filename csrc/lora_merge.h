// What csrc/lora_merge.cpp and the kernels that it chooses from agree on.

#pragma once

#include <cstdint>

#include "lanes.h"

namespace heatsink {

// Columns of A that lie together, and whose sums are in registers at a time.
constexpr int64_t kPanel = 2 * kLanes;

// An adapter's effect on the rows row + i * step, i < count, of one weight.
//
// `a` is A in float32 with its columns in the order of the weight's memory, cut into panels: value
// (k, n) is at (n / kPanel * rank + k) * kPanel + n % kPanel; the last panel is filled up with
// zeros. `b` is B (count, rank) times the term's scale; `magnitude` (count,) or null.
struct MergeTerm {
  const float *a, *b, *magnitude;
  int64_t rank, row, step, count;
};

// Rows of `columns` dense values at `base`, and where they go.
struct MergeWeight {
  const char* base;
  char* out;
  int64_t rows, columns;
  int64_t first_term, last_term;
  int64_t ranks;   // the sum of its terms' ranks
  bool magnitude;  // whether a term has one
  bool stream;     // whether the results go past the caches; rows begin at multiples of 64 bytes
};

// A part of one weight.
struct MergeTask {
  int64_t weight, row, last_row, column, last_column;
};

struct Merge {
  const MergeWeight* weights;
  const MergeTerm* terms;
  const MergeTask* tasks;
  Element element;
};

// Tasks begin..end-1 with the named instructions. Every one gives the same bits.
using MergeKernel = void (*)(const Merge& merge, int64_t begin, int64_t end, float* scratch);
void lora_merge_portable(const Merge& merge, int64_t begin, int64_t end, float* scratch);

#ifdef HEATSINK_X86_KERNELS
void lora_merge_avx2(const Merge& merge, int64_t begin, int64_t end, float* scratch);
void lora_merge_avx512(const Merge& merge, int64_t begin, int64_t end, float* scratch);
#endif

// Rows that a kernel works on at a time, at the most; what it keeps of a term besides B.
constexpr int64_t kMostRows = 8;
constexpr int64_t kSegmentFloats = 20;

// Floats of scratch that a thread needs for a weight.
inline int64_t scratch_floats(const MergeWeight& weight) {
  const int64_t terms = weight.last_term - weight.first_term;
  const int64_t values = (kMostRows + 1) * weight.ranks;
  return terms * kSegmentFloats + kMostRows * (terms + 1) + values;
}

}  // namespace heatsink
