// Elements of float16, bfloat16 and float32 read as float32 and rounded back once, in operations
// that compilers vectorise and every processor has.

#pragma once

#include <cstdint>

#include "exp.h"

namespace {

struct Half {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

HEATSINK_INLINE float read(float value) { return value; }

HEATSINK_INLINE float read(Bfloat16 value) { return float_of_bits(uint32_t{value.bits} << 16); }

HEATSINK_INLINE float read(Half value) {
  const uint32_t magnitude = value.bits & 0x7FFFu;
  // Scaling by a power of two is exact, and makes normal numbers of subnormal ones.
  const uint32_t scaled = bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7C00u ? 0x7F800000u : 0u;
  return float_of_bits(scaled | special | (uint32_t{value.bits & 0x8000u} << 16));
}

HEATSINK_INLINE void write(float value, float& out) { out = value; }

HEATSINK_INLINE void write(float value, Bfloat16& out) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out.bits = static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded);
}

HEATSINK_INLINE void write(float value, Half& out) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Normal results: rounded to even at bit 13, the exponent's bias changed from 127 to 15.
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  const uint32_t normal = rounded >= 0x47800000u ? 0x7C00u : (rounded - 0x38000000u) >> 13;
  // Subnormal results: 1/2 has their unit in the last place, so the addition rounds.
  const uint32_t small = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  out.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

}  // namespace
