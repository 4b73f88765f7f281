// exp in IEEE operations: the same bits in a vector, in a scalar and in kernels/_exp.py, which
// says how it works. The order of every floating-point operation is part of the specification.

#pragma once

#include <cstdint>
#include <cstring>

#include "interface.h"

namespace {

HEATSINK_INLINE float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

HEATSINK_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// e^x within 1 unit in the last place; subnormal, 0 and inf where they are due. NaN gives either
// end.
HEATSINK_INLINE float exp_ieee(float x) {
  // Clamped to [-104, 89] as integers, which takes an instruction a side: a positive float orders
  // as signed, and among unsigned the negative ones come last, by magnitude.
  const auto word = static_cast<int32_t>(bits_of_float(x));
  const auto below = static_cast<uint32_t>(word <= 0x42B20000 ? word : 0x42B20000);
  x = float_of_bits(below <= 0xC2D00000u ? below : 0xC2D00000u);
  // Adding 1.5 * 2^23 rounds to an integer n, here n + 254, in the low bits of the sum.
  const float shifted = x * 0x1.715476p+0f + 12583166.0f;
  const float n = shifted - 12583166.0f;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  const float series =
      (((0x1.6a2446p-10f * r + 0x1.1239e2p-7f) * r + 0x1.5558f2p-5f) * r + 0x1.555492p-3f) * r +
      0x1.fffffcp-2f;
  const float fraction = (series * (r * r) + r) + 1.0f;
  // 2^n as a product of two, so that neither leaves the range of normal numbers.
  const uint32_t bits = bits_of_float(shifted);
  const uint32_t half = bits >> 1;
  return fraction * float_of_bits(half << 23) * float_of_bits((bits - half) << 23);
}

}  // namespace
