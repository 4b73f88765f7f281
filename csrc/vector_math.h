// Float32 vectors of a fixed width, whatever the processor: the compiler splits one into as many
// registers as it needs, so that sums by lane have one order. And SiLU on them.

#pragma once

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

// x / (1 + 2^t), t = -x log2(e), for float with its integers or for Vector with its own.
//
// t is clamped to [-126, 118] and split into an integer n and a fraction f. For f, 2^f = (p + q) /
// (p - q) with p even and q odd, minimax to 1e-8; so one division does for it and for the sigmoid:
// x ((p - q) / ((p - q) + 2^n (p + q))). That t is rounded costs 2^t relative accuracy in
// proportion to |x|, but the further x is from 0 the less that counts, absolutely. kernels/_silu.py
// does the same.
template <typename Float, typename Int, typename Word>
HEATSINK_INLINE void silu(Float& x) {
  Float t = x * -0x1.715476p+0f;
  Int positive;
  Word negative;
  // As integers, since these are single instructions: a positive float orders as signed, and among
  // unsigned the negative ones come last, by magnitude. GCC finds a minimum of vectors in <= alone.
  // A NaN becomes a number; x stays one.
  std::memcpy(&positive, &t, sizeof t);
  positive = positive <= 0x42EC0000 ? positive : 0x42EC0000;
  std::memcpy(&negative, &positive, sizeof t);
  negative = negative <= 0xC2FC0000u ? negative : 0xC2FC0000u;
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
  x *= below / (below + power);
}

}  // namespace
