// Rows of attention's operands: from any strides and dtype to float and back, and their
// transposition. Included where attention_kernel.h is, under the same rules.
#pragma once

#include "attention.h"
#include "interface.h"

namespace heatsink {
namespace {

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

struct Rows {
  const float* data;
  int64_t pitch;
};

// The same rows where they lie, if they can be used there, or else in `memory`.
inline Rows rows_of(const Plane& x, int64_t first, int64_t rows, int64_t last, int64_t columns,
                    float* memory, int64_t pitch) {
  const bool dense = x.element == Element::Float && x.column_stride == 1;
  if (dense && columns % 4 == 0 && first + rows - 1 <= last) {
    return {reinterpret_cast<const float*>(x.data) + first * x.row_stride, x.row_stride};
  }
  read_rows(x, first, rows, last, 0, columns, memory, pitch);
  return {memory, pitch};
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

// rows[lane][c] = factor[lane] * columns[c][lane] for 16 rows.
template <typename I>
void transpose_columns(const float* columns, int64_t channels, typename I::V factor, float* rows,
                       int64_t pitch) {
  for (int64_t c = 0; c < channels; c += 4) {
    typename I::V a[4];
    for (int64_t i = 0; i < 4; ++i) {
      a[i] = I::mul(I::load(columns + (c + i) * kLanes), factor);
    }
    I::transpose(a);
    for (int64_t i = 0; i < 4; ++i) {
      I::scatter(rows + i * pitch + c, pitch, a[i]);
    }
  }
}

// Element `first` and those after it of `out` become the rows, rounded once.
inline void write_rows(Rows from, int64_t rows, int64_t columns, Element element, void* out,
                       int64_t first, int64_t pitch) {
  with_element(element, [&](auto type) {
    using Type = decltype(type);
    auto* data = static_cast<typename Type::Stored*>(out) + first;
    for (int64_t r = 0; r < rows; ++r) {
      auto* __restrict to = data + r * pitch;
      const float* __restrict row = from.data + r * from.pitch;
      for (int64_t c = 0; c < columns; ++c) {
        to[c] = Type::narrow(row[c]);
      }
    }
  });
}

}  // namespace
}  // namespace heatsink
