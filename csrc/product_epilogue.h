// What a product does with its sums, for a set of vector operations `I`: every operation is one
// IEEE operation, without contraction, so that all sets give the same bits.
//
// No standard header here, as in product_kernel.h.
#pragma once

#include "exp.h"
#include "gelu.h"
#include "interface.h"
#include "product.h"
#include "vector_math.h"

namespace heatsink {
namespace {

// x / (1 + e^-t).
HEATSINK_INLINE float gated(float x, float t) { return x / (1.0f + exp_ieee(-t)); }

// Up to 16 numbers of the product's dtype, as float32; zeros beyond.
template <typename I>
HEATSINK_INLINE void read_lanes(const char* from, int64_t count, Vector& x) {
  constexpr int64_t kBytes = I::kBfloat16 ? 2 : 4;
  char some[kLanes * kBytes] = {};
  if (count < kLanes) {
    std::memcpy(some, from, static_cast<size_t>(count * kBytes));
    from = some;
  }
  if constexpr (I::kBfloat16) {
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(&x, &words, sizeof x);
  } else {
    std::memcpy(&x, from, sizeof x);
  }
}

template <typename I>
HEATSINK_INLINE void write_lanes(const Vector& x, int64_t count, char* to) {
  constexpr int64_t kBytes = I::kBfloat16 ? 2 : 4;
  char some[kLanes * kBytes];
  char* all = count < kLanes ? some : to;
  if constexpr (I::kBfloat16) {
    I::narrow(x, all);
  } else {
    std::memcpy(all, &x, sizeof x);
  }
  if (count < kLanes) {
    std::memcpy(to, some, static_cast<size_t>(count * kBytes));
  }
}

// Rounded to nearest even; NaN becomes a quiet one.
HEATSINK_INLINE void narrow_bfloat16(const Vector& x, char* to) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  Words bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Words result = (bits & 0x7FFFFFFFu) > 0x7F800000u ? (Words{} + 0x7FC0u) : rounded;
  const Halves halves = __builtin_convertvector(result, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

HEATSINK_INLINE void activate(Activation activation, Vector& x) {
  float values[kLanes];
  std::memcpy(values, &x, sizeof values);
  switch (activation) {
    case Activation::Silu:
      silu<Vector, Ints, Words>(x);
      return;
    case Activation::Gelu:
      for (float& value : values) {
        value = gelu_ieee(value);
      }
      break;
    case Activation::GeluTanh:
      for (float& value : values) {
        // 2 sqrt(2 / pi) (x + 0.044715 x^3), since (1 + tanh(t / 2)) / 2 = 1 / (1 + e^-t).
        value = gated(value, 0x1.988454p+0f * (value + 0x1.6e4e26p-5f * (value * value * value)));
      }
      break;
    case Activation::QuickGelu:
      for (float& value : values) {
        value = gated(value, 0x1.b3b646p+0f * value);
      }
      break;
    default:
      return;
  }
  std::memcpy(&x, values, sizeof values);
}

// Adds the bias and what the row's sample adds, to 16 columns of weight rows from `column` on.
template <typename I>
HEATSINK_INLINE void add_lanes(const char* from, int64_t column, int64_t end, Vector& x) {
  constexpr int64_t kBytes = I::kBfloat16 ? 2 : 4;
  if (from == nullptr || column >= end) {
    return;
  }
  Vector term;
  const int64_t left = end - column;
  read_lanes<I>(from + column * kBytes, left < kLanes ? left : kLanes, term);
  x += term;
}

// Where 16 of a panel's columns come from and go to. With geglu a panel is 16 values and their 16
// gates; otherwise, 32 columns as they are.
struct Columns {
  int64_t first[2];  // among W's rows
  int64_t end[2];
};

inline Columns columns_of(const Product& p, int64_t panel) {
  if (p.activation == Activation::Geglu) {
    const int64_t half = p.columns / 2;
    const int64_t column = panel * kLanes;
    return {{column, half + column}, {half, p.columns}};
  }
  return {{panel * kPanel, panel * kPanel + kLanes}, {p.columns, p.columns}};
}

// Stores 16 results of a row.
template <typename I>
HEATSINK_INLINE void put(const Product& p, int64_t row, int64_t column, int64_t count, Vector& x) {
  constexpr int64_t kBytes = I::kBfloat16 ? 2 : 4;
  count = count < kLanes ? count : kLanes;
  if (p.residual.data != nullptr) {
    Vector term;
    read_lanes<I>(p.residual.data + row * p.residual.step + column * kBytes, count, term);
    x += term;
  }
  write_lanes<I>(x, count, p.out + row * p.out_step + column * kBytes);
}

// The results of `rows` rows from `row` on, of a panel, from its sums c.
template <typename I>
HEATSINK_INLINE void finish(const Product& p, int64_t row, int64_t rows, int64_t panel,
                            const float* c) {
  const Columns at = columns_of(p, panel);
  const bool geglu = p.activation == Activation::Geglu;
  Vector bias[2] = {};
  for (int v = 0; v < 2; ++v) {
    add_lanes<I>(p.bias, at.first[v], at.end[v], bias[v]);
  }
  int64_t sample = p.sample_add.data == nullptr ? 0 : row / p.sample_rows;
  int64_t rest = p.sample_add.data == nullptr ? rows : (sample + 1) * p.sample_rows - row;
  for (int64_t r = 0; r < rows; ++r, c += kPanel, --rest) {
    if (rest == 0) {
      ++sample;
      rest = p.sample_rows;
    }
    Vector x[2];
    std::memcpy(x, c, sizeof x);
    x[0] += bias[0];
    x[1] += bias[1];
    if (p.sample_add.data != nullptr) {
      const char* added = p.sample_add.data + sample * p.sample_add.step;
      add_lanes<I>(added, at.first[0], at.end[0], x[0]);
      add_lanes<I>(added, at.first[1], at.end[1], x[1]);
    }
    if (geglu) {
      activate(Activation::Gelu, x[1]);
      x[0] *= x[1];
      put<I>(p, row + r, at.first[0], at.end[0] - at.first[0], x[0]);
      continue;
    }
    for (int v = 0; v < 2; ++v) {
      if (at.first[v] < at.end[v]) {
        activate(p.activation, x[v]);
        put<I>(p, row + r, at.first[v], at.end[v] - at.first[v], x[v]);
      }
    }
  }
}

}  // namespace
}  // namespace heatsink
