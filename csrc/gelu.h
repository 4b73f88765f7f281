// The exact GELU in IEEE operations: the same bits in a vector, in a scalar and in
// kernels/_gelu.py, which says how it works. The order of every floating-point operation is part
// of the specification.

#pragma once

#include <cstdint>

#include "exp.h"

namespace {

// x * Phi(x), Phi the normal distribution function.
HEATSINK_INLINE float gelu_ieee(float x) {
  // Compared as integers, which vector units do in one instruction; NaN comes back with x below.
  const auto magnitude = static_cast<int32_t>(bits_of_float(x) & 0x7FFFFFFFu);
  const int32_t end = 0x40A90000;  // 5.28125
  const float a = float_of_bits(static_cast<uint32_t>(magnitude));
  const float c = float_of_bits(static_cast<uint32_t>(magnitude < end ? magnitude : end));
  const float u = c * c;
  const float high = ((0x1.7782e8p-26f * u + 0x1.ab0ee2p-18f) * u + 0x1.7244e0p-13f) * u;
  const float num = ((high + 0x1.3590dcp-8f) * u + 0x1.1be1bap-5f) * u + 0x1.98844ep-2f;
  const float low = ((0x1.3ab132p-20f * u + 0x1.3e61f6p-14f) * u + 0x1.f983fap-10f) * u;
  const float den = ((low + 0x1.dcba3ap-6f) * u + 0x1.039d24p-2f) * u + 1.0f;
  return 0.5f * x + a * (c * num / den);
}

}  // namespace
