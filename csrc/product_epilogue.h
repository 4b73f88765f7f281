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

// Where 16 of a panel's columns come from and go to. With geglu a panel is 16 values and their 16
// gates; otherwise, 32 columns as they are.
struct Columns {
  int64_t first[2];  // among W's rows
  int64_t count[2];  // as many are there
};

inline int64_t at_most(int64_t count) { return count < kLanes ? (count < 0 ? 0 : count) : kLanes; }

inline Columns columns_of(const Product& p, int64_t panel) {
  if (p.activation == Activation::Geglu) {
    const int64_t half = p.columns / 2;
    const int64_t column = panel * kLanes;
    return {{column, half + column}, {at_most(half - column), at_most(half - column)}};
  }
  const int64_t column = panel * kPanel;
  return {{column, column + kLanes},
          {at_most(p.columns - column), at_most(p.columns - column - kLanes)}};
}

// What is done with the sums of a panel.
enum class Kind { Plain, Active, Geglu };

// The results of `rows` rows from `row` on, of a panel, from its sums c. If `kWhole`, no column is
// missing.
template <typename I, bool kWhole, Kind kKind>
HEATSINK_INLINE void finish_rows(const Product& p, int64_t row, int64_t rows, const Columns& at,
                                 const float* c) {
  constexpr int64_t kBytes = I::kBfloat16 ? 2 : 4;
  constexpr int kStored = kKind == Kind::Geglu ? 1 : 2;
  // Copies, since whatever is stored might otherwise be a part of p.
  const Activation activation = p.activation;
  const int64_t counts[2] = {kWhole ? kLanes : at.count[0], kWhole ? kLanes : at.count[1]};
  const int64_t columns[2] = {at.first[0] * kBytes, at.first[1] * kBytes};
  const int64_t out_step = p.out_step, residual_step = p.residual.step;
  const int64_t added_step = p.sample_add.step, sample_rows = p.sample_rows;
  char* out = p.out + row * out_step;
  const char* residual =
      p.residual.data == nullptr ? nullptr : p.residual.data + row * residual_step;
  const int64_t sample = p.sample_add.data == nullptr ? 0 : row / sample_rows;
  const char* added =
      p.sample_add.data == nullptr ? nullptr : p.sample_add.data + sample * added_step;
  int64_t rest = added == nullptr ? rows : (sample + 1) * sample_rows - row;
  Vector bias[2] = {};
  for (int v = 0; v < 2 && p.bias != nullptr; ++v) {
    read_lanes<I>(p.bias + columns[v], counts[v], bias[v]);
  }
  for (int64_t r = 0; r < rows; ++r, c += kPanel, out += out_step) {
    Vector x[2], term;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      std::memcpy(&x[v], c + v * kLanes, sizeof x[v]);
      x[v] += bias[v];
    }
    if (added != nullptr) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        read_lanes<I>(added + columns[v], counts[v], term);
        x[v] += term;
      }
      if (--rest == 0) {
        rest = sample_rows;
        added += added_step;
      }
    }
    if constexpr (kKind == Kind::Geglu) {
      activate(Activation::Gelu, x[1]);
      x[0] *= x[1];
    } else if constexpr (kKind == Kind::Active) {
      activate(activation, x[0]);
      activate(activation, x[1]);
    }
    if (residual != nullptr) {
#pragma GCC unroll 2
      for (int v = 0; v < kStored; ++v) {
        read_lanes<I>(residual + columns[v], counts[v], term);
        x[v] += term;
      }
      residual += residual_step;
    }
#pragma GCC unroll 2
    for (int v = 0; v < kStored; ++v) {
      write_lanes<I>(x[v], counts[v], out + columns[v]);
    }
  }
}

template <typename I, Kind kKind>
HEATSINK_INLINE void finish_kind(const Product& p, int64_t row, int64_t rows, int64_t panel,
                                 const float* c) {
  const Columns at = columns_of(p, panel);
  if (at.count[0] == kLanes && at.count[1] == kLanes) {
    finish_rows<I, true, kKind>(p, row, rows, at, c);
  } else {
    finish_rows<I, false, kKind>(p, row, rows, at, c);
  }
}

template <typename I>
inline void finish(const Product& p, int64_t row, int64_t rows, int64_t panel, const float* c) {
  if (p.activation == Activation::None) {
    finish_kind<I, Kind::Plain>(p, row, rows, panel, c);
  } else if (p.activation == Activation::Geglu) {
    finish_kind<I, Kind::Geglu>(p, row, rows, panel, c);
  } else {
    finish_kind<I, Kind::Active>(p, row, rows, panel, c);
  }
}

// What is done beside a block's products: the block before is finished, whose sums are there, and
// weights that come next are asked for.
template <typename I>
struct Aside {
  static constexpr int64_t kSome = 4;   // rows
  static constexpr int64_t kLine = 64;  // bytes
  const Product& p;
  int64_t row = 0, rows = 0, panel = 0;
  const float* sums = nullptr;
  const char* ahead = nullptr;
  int64_t lines = 0, at_once = 0;

  void finish_later(int64_t first, int64_t count, int64_t of_panel, const float* c) {
    row = first;
    rows = count;
    panel = of_panel;
    sums = c;
  }
  void finish(int64_t some) {
    heatsink::finish<I>(p, row, some, panel, sums);
    row += some;
    rows -= some;
    sums += some * kPanel;
  }
  void finish_some() {
    if (rows > 0) {
      finish(rows < kSome ? rows : kSome);
    }
  }
  void finish() {
    if (rows > 0) {
      finish(rows);
    }
  }
  // Bytes that are asked for in so many steps.
  void fetch_later(const char* from, int64_t bytes, int64_t steps) {
    ahead = from;
    lines = bytes / kLine;
    at_once = ceil_div(lines, steps);
  }
  void fetch_some() {
    const int64_t some = lines < at_once ? lines : at_once;
    for (int64_t line = 0; line < some; ++line, ahead += kLine) {
      __builtin_prefetch(ahead, 0, 2);
    }
    lines -= some;
  }
};

}  // namespace
}  // namespace heatsink
