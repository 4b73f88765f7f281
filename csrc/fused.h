// a * b + c with one rounding on every processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace heatsink {
namespace {

// As every instruction set's fused multiply-add gives it.
inline float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  // The product is exact in double. If the sum is not, its last bit is made odd, so that rounding
  // it to float rounds the exact sum: double has more than two bits more than twice float's.
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = static_cast<double>(c);
  const double sum = product + addend;
  const double part = sum - product;
  const double lost = (product - (sum - part)) + (addend - part);
  int64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  const bool away = (lost > 0.0) == (sum > 0.0);
  const bool inexact = (lost > 0.0) | (lost < 0.0);
  bits += inexact && (bits & 1) == 0 ? (away ? 1 : -1) : 0;
  double odd;
  std::memcpy(&odd, &bits, sizeof odd);
  return static_cast<float>(odd);
#endif
}

}  // namespace
}  // namespace heatsink
