// Rows of attention's operands: from any strides and dtype to float and back, and their
// transposition. Included where attention_kernel.h is, under the same rules.
#pragma once

#include "attention.h"
#include "interface.h"

namespace heatsink {
namespace {

HEATSINK_INLINE int64_t size_of(Element element) { return element == Element::Float ? 4 : 2; }

HEATSINK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One head of one sample of an operand.
struct Plane {
  const char* data;
  Element element;
  int64_t row_stride, column_stride;
};

inline Plane plane_of(const Attention& a, const Operand& x, int64_t sample, int64_t head) {
  const int64_t first = (sample * x.batch + head * x.head) * size_of(a.element);
  return {static_cast<const char*>(x.data) + first, a.element, x.token, x.channel};
}

// 16 elements as floats.
template <typename I>
HEATSINK_INLINE typename I::V widen(Element element, const char* from) {
  switch (element) {
    case Element::Half:
      return I::widen_half(from);
    case Element::BFloat16:
      return I::widen_bfloat16(from);
    default:
      return I::load(reinterpret_cast<const float*>(from));
  }
}

// 16 floats as elements, rounded to nearest, ties to even.
template <typename I>
HEATSINK_INLINE void narrow(Element element, typename I::V x, char* to) {
  switch (element) {
    case Element::Half:
      return I::narrow_half(x, to);
    case Element::BFloat16:
      return I::narrow_bfloat16(x, to);
    default:
      return I::store(reinterpret_cast<float*>(to), x);
  }
}

// `count` elements that lie `stride` apart, one after the other.
inline void collect(const char* from, int64_t stride, int64_t count, int64_t size, char* to) {
  for (int64_t i = 0; i < count; ++i) {
    if (size == 4) {
      __builtin_memcpy(to + 4 * i, from + 4 * i * stride, 4);
    } else {
      __builtin_memcpy(to + 2 * i, from + 2 * i * stride, 2);
    }
  }
}

// out[r][c] = x[first + r][column + c] in float. Rows past the last one repeat it; rows are filled
// up to a multiple of 16 floats.
template <typename I>
void read_rows(const Plane& x, int64_t first, int64_t rows, int64_t last, int64_t column,
               int64_t columns, float* out, int64_t pitch) {
  const int64_t size = size_of(x.element);
  const int64_t stride = x.column_stride;
  for (int64_t r = 0; r < rows; ++r) {
    const char* from = x.data + (smaller(first + r, last) * x.row_stride + column * stride) * size;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const char* next = from + c * stride * size;
      float* to = out + r * pitch + c;
      if (stride == 1 && c + kLanes <= columns) {
        I::store(to, widen<I>(x.element, next));
        continue;
      }
      alignas(64) char few[kLanes * 4] = {};
      collect(next, stride, smaller(kLanes, columns - c), size, few);
      I::store(to, widen<I>(x.element, few));
    }
  }
}

struct Rows {
  const float* data;
  int64_t pitch;
};

// The same rows where they lie, if they can be used there, or else in `memory`.
template <typename I>
Rows rows_of(const Plane& x, int64_t first, int64_t rows, int64_t last, int64_t columns,
             float* memory, int64_t pitch) {
  const bool dense = x.element == Element::Float && x.column_stride == 1;
  if (dense && columns % 4 == 0 && first + rows - 1 <= last) {
    return {reinterpret_cast<const float*>(x.data) + first * x.row_stride, x.row_stride};
  }
  read_rows<I>(x, first, rows, last, 0, columns, memory, pitch);
  return {memory, pitch};
}

// out[c][lane] = rows[lane][c] for 16 rows of so many words of 4 bytes, whatever they are; `pitch`
// and `out_pitch` in words. Words past the last, up to a multiple of 4, are read and written too.
template <typename I>
HEATSINK_INLINE void transpose_words(const float* rows, int64_t pitch, int64_t words, float* out,
                                     int64_t out_pitch) {
  for (int64_t c = 0; c < words; c += 4) {
    typename I::V a[4];
    for (int64_t r = 0; r < 4; ++r) {
      a[r] = I::gather(rows + r * pitch + c, pitch);
    }
    I::transpose(a);
    for (int64_t r = 0; r < 4; ++r) {
      I::store(out + (c + r) * out_pitch, a[r]);
    }
  }
}

// out[c][lane] = factor * rows[lane][c] for 16 rows.
template <typename I>
void transpose_rows(Rows rows, int64_t columns, float factor, float* out) {
  const int64_t pitch = rows.pitch;
  const typename I::V scale = I::splat(factor);
  for (int64_t c = 0; c < columns; c += 4) {
    typename I::V a[4];
    for (int64_t r = 0; r < 4; ++r) {
      a[r] = I::gather(rows.data + r * pitch + c, pitch);
    }
    I::transpose(a);
    for (int64_t r = 0; r < 4; ++r) {
      I::store(out + (c + r) * kLanes, I::mul(a[r], scale));
    }
  }
}

// rows[lane][c] = factor[lane] * columns[c][lane] for 16 rows; columns lie `step` floats apart.
template <typename I>
void transpose_columns(const float* columns, int64_t step, int64_t channels, typename I::V factor,
                       float* rows, int64_t pitch) {
  for (int64_t c = 0; c < channels; c += 4) {
    typename I::V a[4];
    for (int64_t i = 0; i < 4; ++i) {
      a[i] = I::mul(I::load(columns + (c + i) * step), factor);
    }
    I::transpose(a);
    for (int64_t i = 0; i < 4; ++i) {
      I::scatter(rows + i * pitch + c, pitch, a[i]);
    }
  }
}

// Rows of `out` that lie `pitch` elements apart become `rows` rows of `from`, rounded once.
template <typename I>
void write_rows(Rows from, int64_t rows, int64_t columns, Element element, char* out,
                int64_t pitch) {
  const int64_t size = size_of(element);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const typename I::V x = I::load(from.data + r * from.pitch + c);
      char* to = out + (r * pitch + c) * size;
      if (c + kLanes <= columns) {
        narrow<I>(element, x, to);
      } else {
        alignas(64) char few[kLanes * 4];
        narrow<I>(element, x, few);
        collect(few, 1, columns - c, size, to);
      }
    }
  }
}

}  // namespace
}  // namespace heatsink
