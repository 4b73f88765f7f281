// Float32 vectors of a fixed width, the 16-bit float formats, and reductions whose order does not
// depend on the processor: the compiler splits a vector into as many registers as it needs.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>

#include "exp.h"
#include "interface.h"

namespace {

constexpr int64_t kLanes = 16;

// Never passed by value: its calling convention would depend on the instruction set.
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(float))));

HEATSINK_INLINE void load_vector(const float* from, Vector& value) {
  std::memcpy(&value, from, sizeof value);
}

HEATSINK_INLINE void store_vector(float* to, const Vector& value) {
  std::memcpy(to, &value, sizeof value);
}

// x / (1 + 2^t), t = -x log2(e), for float with its integers or for Vector with its own.
//
// t is clamped to [-126, 118] and split into an integer n and a fraction f. For f, 2^f = (p + q) /
// (p - q) with p even and q odd, minimax to 1e-8; so one division does for it and for the sigmoid:
// x (p - q) / ((p - q) + 2^n (p + q)). That t is rounded costs 2^t relative accuracy in proportion
// to |x|, but the further x is from 0 the less that counts, absolutely. kernels/_silu.py does the
// same.
template <typename Float, typename Int, typename Word>
HEATSINK_INLINE void silu(Float& x) {
  Float t = x * -0x1.715476p+0f;
  Int positive;
  Word negative;
  // As integers, since these are single instructions: a positive float orders as signed, and among
  // unsigned the negative ones come last, by magnitude. A NaN becomes a number; x stays one.
  std::memcpy(&positive, &t, sizeof t);
  positive = positive < 0x42EC0000 ? positive : 0x42EC0000;
  std::memcpy(&negative, &positive, sizeof t);
  negative = negative < 0xC2FC0000u ? negative : 0xC2FC0000u;
  std::memcpy(&t, &negative, sizeof t);
  // Adding 1.5 * 2^23 rounds to an integer, which is in the low bits of the sum.
  const Float shifted = t + 0x1.8p23f;
  const Float f = t - (shifted - 0x1.8p23f);
  const Float square = f * f;
  const Float even = square * 0x1.155816p+4f + 0x1.68e014p+8f;
  const Float odd = f * (square + 0x1.f44788p+6f);
  const Float below = even - odd;
  Float power = even + odd;
  Word integer, bits;
  std::memcpy(&integer, &shifted, sizeof t);
  std::memcpy(&bits, &power, sizeof t);
  bits += integer << 23;
  std::memcpy(&power, &bits, sizeof t);
  x = x * below / (below + power);
}

HEATSINK_INLINE float half_to_float(uint16_t half) {
  const uint32_t exponent = 0x0F800000u;
  const uint32_t bits = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  const uint32_t rebiased = bits + (112u << 23);
  // Subnormal: as 2^-14 * (1 + fraction) - 2^-14, which no operation on subnormals takes part in.
  const float tiny = float_of_bits(rebiased + (1u << 23)) - 0x1p-14f;
  const uint32_t special = rebiased + (112u << 23);
  const uint32_t normal = (bits & exponent) == exponent ? special : rebiased;
  const uint32_t magnitude = (bits & exponent) == 0 ? bits_of_float(tiny) : normal;
  return float_of_bits(magnitude | static_cast<uint32_t>(half & 0x8000u) << 16);
}

// Rounded to nearest even; NaN becomes a quiet one.
HEATSINK_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  // Adding 1/2 puts the last place of a subnormal half where a float's is.
  const uint32_t tiny = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
  const uint32_t half = magnitude >= 0x47800000u ? special : finite;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

HEATSINK_INLINE float bfloat16_to_float(uint16_t value) {
  return float_of_bits(static_cast<uint32_t>(value) << 16);
}

// Rounded to nearest even; NaN becomes a quiet one.
HEATSINK_INLINE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded);
}

using torch::headeronly::ScalarType;

HEATSINK_CLONES void halves_to_floats(const uint16_t* __restrict from, int64_t count,
                                      float* __restrict to) {
  for (int64_t j = 0; j < count; ++j) {
    to[j] = half_to_float(from[j]);
  }
}

HEATSINK_CLONES void bfloat16s_to_floats(const uint16_t* __restrict from, int64_t count,
                                         float* __restrict to) {
  for (int64_t j = 0; j < count; ++j) {
    to[j] = bfloat16_to_float(from[j]);
  }
}

HEATSINK_CLONES void floats_to_halves(const float* __restrict from, int64_t count,
                                      uint16_t* __restrict to) {
  for (int64_t j = 0; j < count; ++j) {
    to[j] = float_to_half(from[j]);
  }
}

HEATSINK_CLONES void floats_to_bfloat16s(const float* __restrict from, int64_t count,
                                         uint16_t* __restrict to) {
  for (int64_t j = 0; j < count; ++j) {
    to[j] = float_to_bfloat16(from[j]);
  }
}

// `count` elements of a float dtype at `from`, as float32.
inline void read_floats(ScalarType dtype, const void* from, int64_t count, float* to) {
  if (dtype == ScalarType::Float) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  } else if (dtype == ScalarType::Half) {
    halves_to_floats(static_cast<const uint16_t*>(from), count, to);
  } else {
    bfloat16s_to_floats(static_cast<const uint16_t*>(from), count, to);
  }
}

// The other way, rounded to nearest even.
inline void write_floats(ScalarType dtype, const float* from, int64_t count, void* to) {
  if (dtype == ScalarType::Float) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  } else if (dtype == ScalarType::Half) {
    floats_to_halves(from, count, static_cast<uint16_t*>(to));
  } else {
    floats_to_bfloat16s(from, count, static_cast<uint16_t*>(to));
  }
}

}  // namespace
