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
  const int32_t end = 0x40A50000;  // 5.15625
  const float a = float_of_bits(static_cast<uint32_t>(magnitude));
  const float c = float_of_bits(static_cast<uint32_t>(magnitude < end ? magnitude : end));
  const float u = c * c;
  const float high = ((u + 0x1.b43ea6p+5f) * u + 0x1.c6ddbap+9f) * u;
  const float num = (high + 0x1.03bbd4p+13f) * u + 0x1.f17ba8p+15f;
  const float low = ((0x1.5a6798p-4f * u + 0x1.38f226p+4f) * u + 0x1.c91204p+8f) * u;
  const float den = ((low + 0x1.835fbap+12f) * u + 0x1.7296dap+15f) * u + 0x1.37c06cp+17f;
  return 0.5f * x + a * (c * num / den);
}

}  // namespace
