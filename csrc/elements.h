// Elements of float16, bfloat16 and float32 read as float32 and rounded back once, in operations
// that compilers vectorise and every processor has.

#pragma once

#include <cstdint>

#include "float16.h"

namespace {

struct Half {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

HEATSINK_INLINE float read(float value) { return value; }
HEATSINK_INLINE float read(Bfloat16 value) { return bfloat16_to_float(value.bits); }
HEATSINK_INLINE float read(Half value) { return half_to_float(value.bits); }

HEATSINK_INLINE void write(float value, float& out) { out = value; }
HEATSINK_INLINE void write(float value, Bfloat16& out) { out.bits = float_to_bfloat16(value); }

}  // namespace
