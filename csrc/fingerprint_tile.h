// The arithmetic of docs/fingerprint.md on one tile of a row: keys, words, and what is known of
// each dtype.

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "interface.h"

namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kTile = 1024;  // elements whose keys are made at a time, for all rows
constexpr uint32_t kSalt = 0x27D4EB2Fu;

struct Keys {
  alignas(64) uint32_t lo[kTile];
  alignas(64) uint32_t hi[kTile];
};

// Keys of the logical indices first, first + step, ...
HEATSINK_CLONES void fill_keys(uint32_t first, uint32_t step, int64_t count, Keys& keys) {
  uint32_t spread = (2u * first + 1u) * 0x9E3779B1u;
  const uint32_t increment = 2u * step * 0x9E3779B1u;
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t a = spread ^ ((spread >> 15) & ~1u);
    spread += increment;
    uint32_t b = a * 0x85EBCA77u;
    b ^= (b >> 16) & ~1u;
    keys.lo[j] = b;
    keys.hi[j] = a * b;
  }
}

// What is known of one row: order-free, so parts are merged in any order.
struct Summary {
  uint64_t digest = 0;
  uint64_t nonfinite = 0;
  uint64_t magnitude = 0;  // bits of the largest finite magnitude, or the magnitude of an integer
};

HEATSINK_CLONES uint64_t dot32(const uint32_t* __restrict words, const Keys& keys, int64_t count) {
  uint64_t low = 0;
  uint32_t high = 0;
  for (int64_t j = 0; j < count; ++j) {
    low += uint64_t{keys.lo[j]} * words[j];
    high += keys.hi[j] * words[j];
  }
  return low + (uint64_t{high} << 32);
}

HEATSINK_CLONES uint64_t dot64(const uint64_t* __restrict words, const Keys& keys, int64_t count) {
  uint64_t sum = 0;
  for (int64_t j = 0; j < count; ++j) {
    sum += ((uint64_t{keys.hi[j]} << 32) | keys.lo[j]) * words[j];
  }
  return sum;
}

template <typename Bits>
HEATSINK_INLINE Bits fold(Bits bits) {
  if constexpr (sizeof(Bits) == 8) {
    bits ^= bits >> 32;
    return bits ^ (bits >> 16) ^ kSalt;
  } else {
    return bits ^ (bits >> 16) ^ kSalt;
  }
}

// Word is uint32_t for elements of up to 32 bits and uint64_t above; Infinity is the bit pattern
// of +inf and QuietNan what every NaN is read as.
template <typename Bits, typename Word, Bits Infinity, Bits QuietNan>
HEATSINK_INLINE void read_floats(const void* data, int64_t count, Word* __restrict words,
                                 Summary& summary) {
  // Signed, because a signed comparison is what vector units have; magnitudes fit.
  using Signed = std::make_signed_t<Bits>;
  const Bits* bits = static_cast<const Bits*>(data);
  Signed largest = 0;
  Signed special = 0;  // minus their number, at most kTile, so 16 bits hold it
  for (int64_t j = 0; j < count; ++j) {
    const auto magnitude = static_cast<Signed>(bits[j] & (static_cast<Bits>(~Bits{0}) >> 1));
    const auto is_special = static_cast<Signed>(-(magnitude >= static_cast<Signed>(Infinity)));
    const auto is_nan = static_cast<Bits>(-(magnitude > static_cast<Signed>(Infinity)));
    const auto finite = static_cast<Signed>(magnitude & ~is_special);
    largest = largest > finite ? largest : finite;
    special = static_cast<Signed>(special + is_special);
    words[j] = fold<Word>(static_cast<Bits>((bits[j] & ~is_nan) | (QuietNan & is_nan)));
  }
  summary.nonfinite += static_cast<uint64_t>(-special);
  summary.magnitude = std::max(summary.magnitude, static_cast<uint64_t>(largest));
}

template <typename Int, typename Word>
HEATSINK_INLINE void read_integers(const void* data, int64_t count, Word* __restrict words,
                                   Summary& summary) {
  using Unsigned = std::make_unsigned_t<Int>;
  const Int* values = static_cast<const Int*>(data);
  Unsigned largest = 0;
  for (int64_t j = 0; j < count; ++j) {
    const Unsigned bits = static_cast<Unsigned>(values[j]);
    const Unsigned magnitude = values[j] < 0 ? static_cast<Unsigned>(Unsigned{0} - bits) : bits;
    largest = largest > magnitude ? largest : magnitude;
    words[j] = fold<Word>(bits);
  }
  summary.magnitude = std::max<uint64_t>(summary.magnitude, largest);
}

using Reader32 = void (*)(const void*, int64_t, uint32_t*, Summary&);
using Reader64 = void (*)(const void*, int64_t, uint64_t*, Summary&);

HEATSINK_CLONES void read_half(const void* d, int64_t n, uint32_t* w, Summary& s) {
  read_floats<uint16_t, uint32_t, 0x7C00, 0x7E00>(d, n, w, s);
}
HEATSINK_CLONES void read_bfloat16(const void* d, int64_t n, uint32_t* w, Summary& s) {
  read_floats<uint16_t, uint32_t, 0x7F80, 0x7FC0>(d, n, w, s);
}
HEATSINK_CLONES void read_float(const void* d, int64_t n, uint32_t* w, Summary& s) {
  read_floats<uint32_t, uint32_t, 0x7F800000u, 0x7FC00000u>(d, n, w, s);
}
HEATSINK_CLONES void read_double(const void* d, int64_t n, uint64_t* w, Summary& s) {
  read_floats<uint64_t, uint64_t, 0x7FF0000000000000u, 0x7FF8000000000000u>(d, n, w, s);
}
HEATSINK_CLONES void read_uint8(const void* d, int64_t n, uint32_t* w, Summary& s) {
  read_integers<uint8_t, uint32_t>(d, n, w, s);
}
HEATSINK_CLONES void read_int32(const void* d, int64_t n, uint32_t* w, Summary& s) {
  read_integers<int32_t, uint32_t>(d, n, w, s);
}
HEATSINK_CLONES void read_int64(const void* d, int64_t n, uint64_t* w, Summary& s) {
  read_integers<int64_t, uint64_t>(d, n, w, s);
}

template <typename Value, typename Bits>
Value from_bits(Bits bits) {
  Value value;
  static_assert(sizeof value == sizeof bits);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

float float_magnitude(uint64_t bits) { return from_bits<float>(static_cast<uint32_t>(bits)); }
float bfloat16_magnitude(uint64_t bits) { return float_magnitude(bits << 16); }
float double_magnitude(uint64_t bits) { return static_cast<float>(from_bits<double>(bits)); }
float integer_magnitude(uint64_t value) { return static_cast<float>(value); }

float half_magnitude(uint64_t bits) {
  const auto exponent = static_cast<uint32_t>(bits >> 10);
  const auto mantissa = static_cast<uint32_t>(bits & 0x3FF);
  if (exponent == 0) {
    return static_cast<float>(mantissa) * 0x1p-24f;
  }
  return float_magnitude(((exponent + 112) << 23) | (mantissa << 13));
}

struct Type {
  Reader32 read32;
  Reader64 read64;
  float (*magnitude)(uint64_t);
};

Type type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return {read_half, nullptr, half_magnitude};
    case ScalarType::BFloat16:
      return {read_bfloat16, nullptr, bfloat16_magnitude};
    case ScalarType::Float:
      return {read_float, nullptr, float_magnitude};
    case ScalarType::Double:
      return {nullptr, read_double, double_magnitude};
    case ScalarType::Byte:
    case ScalarType::Bool:
      return {read_uint8, nullptr, integer_magnitude};
    case ScalarType::Int:
      return {read_int32, nullptr, integer_magnitude};
    case ScalarType::Long:
      return {nullptr, read_int64, integer_magnitude};
    default:
      STD_TORCH_CHECK(false, "x: dtype not supported by fingerprint");
  }
}

}  // namespace
