// The noise of docs/noise.md, a tile at a time: Philox4x32-10 and the normal transform.
//
// The order of every floating-point operation below is part of the specification.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "interface.h"

namespace {

constexpr int64_t kNoiseBlocks = 64;  // Philox blocks made at a time, of four words each
constexpr int64_t kNoiseTile = 4 * kNoiseBlocks;

HEATSINK_INLINE void philox_round(uint32_t c[4], uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t{0xD2511F53u} * c[0];
  const uint64_t p1 = uint64_t{0xCD9E8D57u} * c[2];
  const uint32_t c1 = c[1];
  const uint32_t c3 = c[3];
  c[0] = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  c[1] = static_cast<uint32_t>(p1);
  c[2] = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c[3] = static_cast<uint32_t>(p0);
}

struct Stream {
  uint32_t k0, k1, step, purpose;
};

// words[4j .. 4j+3] = Philox of block first + j.
HEATSINK_CLONES void philox_tile(Stream s, uint64_t first, uint32_t* __restrict words) {
  for (int64_t j = 0; j < kNoiseBlocks; ++j) {
    const uint64_t block = first + static_cast<uint64_t>(j);
    uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), s.step,
                     s.purpose};
    uint32_t k0 = s.k0;
    uint32_t k1 = s.k1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      philox_round(c, k0, k1);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[4 * j] = c[0];
    words[4 * j + 1] = c[1];
    words[4 * j + 2] = c[2];
    words[4 * j + 3] = c[3];
  }
}

HEATSINK_INLINE float as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

HEATSINK_INLINE int32_t as_int(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// -ln(y / 2^32) for y in [0.5, 2^31].
HEATSINK_INLINE float minus_log(float y) {
  const int32_t bits = as_int(y);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float mantissa = as_float(bits - exponent * (1 << 23));
  const float f = mantissa - 1.0f;
  const float s = f / (f + 2.0f);
  const float z = s * s;
  const float series = ((0x1.24924ap-2f * z + 0x1.99999ap-2f) * z + 0x1.555556p-1f) * z + 2.0f;
  return static_cast<float>(32 - exponent) * 0x1.62e430p-1f - s * series;
}

HEATSINK_INLINE float central(float q) {
  const float r = 0.180625f - q * q;
  const float num = ((59.109374720f * r + 159.29113202f) * r + 50.434271938f) * r + 3.3871327179f;
  const float den = ((67.187563600f * r + 78.757757664f) * r + 17.895169469f) * r + 1.0f;
  return q * num / den;
}

HEATSINK_INLINE float tail(float y) {
  const float r = std::sqrt(minus_log(y)) - 1.6f;
  const float num = ((0.17023821103f * r + 1.3067284816f) * r + 2.7568153900f) * r + 1.4234372777f;
  const float den = (0.12021132975f * r + 0.73700164250f) * r + 1.0f;
  return num / den;
}

HEATSINK_CLONES void transform_tile(const uint32_t* __restrict words, float* __restrict out) {
  for (int64_t j = 0; j < kNoiseTile; ++j) {
    const int32_t v = static_cast<int32_t>(words[j] ^ 0x80000000u);
    const int32_t sign = v >> 31;
    const int32_t a = v ^ sign;
    const float q = (static_cast<float>(a) + 0.5f) * 0x1p-32f;
    const float y = static_cast<float>(0x7FFFFFFF - a) + 0.5f;
    const float inner = central(q);
    const float outer = tail(y);
    const float magnitude = q <= 0.425f ? inner : outer;
    out[j] = as_float(as_int(magnitude) ^ (sign & static_cast<int32_t>(0x80000000u)));
  }
}

// out[0 .. kNoiseTile): the values of a stream from the one at kNoiseTile * tile on.
HEATSINK_INLINE void normal_tile(const Stream& stream, int64_t tile, float* out) {
  uint32_t words[kNoiseTile];
  philox_tile(stream, static_cast<uint64_t>(tile) * kNoiseBlocks, words);
  transform_tile(words, out);
}

HEATSINK_INLINE Stream stream_of(int64_t seed, int64_t step, int64_t purpose) {
  const uint64_t key = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(step),
          static_cast<uint32_t>(purpose)};
}

}  // namespace
