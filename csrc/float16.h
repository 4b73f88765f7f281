// float16 and bfloat16 to and from float32, without operations on subnormal numbers, which a
// process may have told its processor to flush.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "exp.h"
#include "interface.h"

namespace {

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

#if defined(__x86_64__) && defined(__GNUC__)
// Instructions of their own, on any processor with AVX2, and the same bits.
#define HEATSINK_HALF_INSTRUCTIONS __attribute__((target("avx2,f16c")))

HEATSINK_HALF_INSTRUCTIONS inline int64_t halves_by_eight(const uint16_t* from, int64_t count,
                                                          float* to) {
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
    _mm256_storeu_ps(to + j, _mm256_cvtph_ps(halves));
  }
  return j;
}

HEATSINK_HALF_INSTRUCTIONS inline int64_t floats_by_eight(const float* from, int64_t count,
                                                          uint16_t* to) {
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), halves);
  }
  return j;
}

inline bool has_half_instructions() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}
#else
inline int64_t halves_by_eight(const uint16_t*, int64_t, float*) { return 0; }
inline int64_t floats_by_eight(const float*, int64_t, uint16_t*) { return 0; }
inline bool has_half_instructions() { return false; }
#endif

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
    const auto* halves = static_cast<const uint16_t*>(from);
    const int64_t done = has_half_instructions() ? halves_by_eight(halves, count, to) : 0;
    halves_to_floats(halves + done, count - done, to + done);
  } else {
    bfloat16s_to_floats(static_cast<const uint16_t*>(from), count, to);
  }
}

// The other way, rounded to nearest even.
inline void write_floats(ScalarType dtype, const float* from, int64_t count, void* to) {
  if (dtype == ScalarType::Float) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  } else if (dtype == ScalarType::Half) {
    auto* halves = static_cast<uint16_t*>(to);
    const int64_t done = has_half_instructions() ? floats_by_eight(from, count, halves) : 0;
    floats_to_halves(from + done, count - done, halves + done);
  } else {
    floats_to_bfloat16s(from, count, static_cast<uint16_t*>(to));
  }
}

}  // namespace
