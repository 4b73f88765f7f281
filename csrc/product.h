// What the products (csrc/linear.cpp, csrc/conv2d.cpp) and the kernels that they choose from agree
// on.
//
// A product is out = act(A W^T + bias + sample_add) + residual. The rows of A are pixels' channels,
// or for a convolution what its kernel sees of the images at an output pixel, laid out (ky, kx,
// channel); `depth` is their length. W is packed (csrc/product_pack.cpp).
#pragma once

#include <cstdint>

#include "lanes.h"
#include "tile.h"

namespace heatsink {

enum class Activation { None, Silu, Gelu, GeluTanh, QuickGelu, Geglu };

// Pixels with dense channels; distances in bytes.
struct Image {
  const char* data;
  int64_t channels, sample, row, pixel;
};

// Rows with dense columns at a distance in bytes; null where there are none.
struct Rows {
  const char* data;
  int64_t step;
};

struct Product {
  bool bfloat16;  // or float32
  int64_t rows, depth, columns;
  // The left side. The second image's channels, if any, come after the first's.
  Image images[2];
  int64_t height, width;  // of the images, once upsampled
  int64_t out_height, out_width;
  int64_t kernel_width, stride, padding;
  int64_t shift;  // 1 if the images are upsampled by 2, else 0
  bool direct;    // a row of A is one stretch of memory, and rows are `images[0].pixel` apart
  const char* weight;
  // The epilogue. `columns` of bias and sample_add, one row of the latter for `sample_rows` rows.
  Activation activation;
  const char* bias;
  Rows sample_add, residual;
  int64_t sample_rows;
  char* out;
  int64_t out_step;
  // The partition into tasks, which no bits depend on: so many rows and panels each, numbered with
  // the rows innermost.
  int64_t task_rows, task_panels;
  int64_t task_depth;  // what is worked on at a time; in float32 a multiple of kSum
};

// Float32 sums go over so many products, one fused multiply-add after the other, before they are
// added to what came before: long sums would lose digits. The bits depend on it.
constexpr int64_t kSum = 128;
// The depth that is worked on at a time, at most, in bfloat16 and in float32.
constexpr int64_t kDepth = 640;
constexpr int64_t kFloatDepth = 4 * kSum;
constexpr int64_t kBlockRows = 32;  // rows that are worked on at a time, at most

constexpr int64_t kTaskRows = 512;  // rows a task has at most
constexpr int64_t kTaskSums =
    192 << 10;  // sums that a task keeps if the depth is worked on in parts
constexpr int64_t kTaskWeight = 1 << 20;  // bytes of W that a task goes over again and again

constexpr int64_t ceil_div(int64_t value, int64_t step) { return (value + step - 1) / step; }

// Bytes of scratch that a thread needs: copied rows of A, then sums.
constexpr int64_t kCopyBytes = kBlockRows * (kFloatDepth * 4 + 64);
constexpr int64_t kScratchBytes = kCopyBytes + (kTaskSums + 2 * kBlockRows * kPanel) * 4;

inline int64_t row_tasks(const Product& p) { return ceil_div(p.rows, p.task_rows); }
inline int64_t panels(const Product& p) { return ceil_div(p.columns, kPanel); }
inline int64_t tasks(const Product& p) { return row_tasks(p) * ceil_div(panels(p), p.task_panels); }
// Columns that a panel is stored with; the last may be narrow.
inline int64_t panel_width(bool geglu, int64_t columns, int64_t panel) {
  return geglu || columns - panel * kPanel > kLanes ? kPanel : kLanes;
}
// Elements of packed weights. Depth is padded with zeros, columns too.
inline int64_t packed_depth(bool bfloat16, int64_t depth) {
  return bfloat16 ? round_up(depth, kTile) : depth;
}
inline int64_t packed_size(bool bfloat16, bool geglu, int64_t columns, int64_t depth) {
  const int64_t last = ceil_div(columns, kPanel) - 1;
  return packed_depth(bfloat16, depth) * (last * kPanel + panel_width(geglu, columns, last));
}
// Packs a weight of `columns` rows of `depth`, both dense. A panel is 32 rows (16 if that is all
// there is), or with geglu 16 and their 16 gates. In float32 a panel lies depth by columns; in
// bfloat16 in tiles of 16 columns and 32 of the depth: 16 pairs along the depth by 16 columns.
void pack(bool bfloat16, bool geglu, int64_t columns, int64_t depth, const char* weight, char* to);

inline int64_t pitch_of(const Product& p) { return p.task_depth * (p.bfloat16 ? 2 : 4) + 64; }

// One task with the named instructions. Every one gives the same bits for the same dtype.
using ProductKernel = void (*)(const Product& p, int64_t task, char* scratch);
void product_portable(const Product& p, int64_t task, char* scratch);

#ifdef HEATSINK_X86_KERNELS
void product_avx2(const Product& p, int64_t task, char* scratch);
void product_avx512(const Product& p, int64_t task, char* scratch);
void product_amx(const Product& p, int64_t task, char* scratch);  // bfloat16 alone
#endif

}  // namespace heatsink
