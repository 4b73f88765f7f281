// heatsink::normal on the CPU: Philox4x32-10 and the normal transform of docs/noise.md.
//
// The order of every floating-point operation below is part of the specification.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "interface.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t kTile = 64;   // Philox blocks made at a time
constexpr int64_t kGrain = 32;  // tiles a thread should have at least

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
  for (int64_t j = 0; j < kTile; ++j) {
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
  for (int64_t j = 0; j < 4 * kTile; ++j) {
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

// keys, steps: (rows,) int64. Returns (rows, count) float32.
Tensor normal(Tensor keys, Tensor steps, int64_t purpose, int64_t count) {
  const auto int64 = torch::headeronly::ScalarType::Long;
  STD_TORCH_CHECK(keys.dim() == 1 && keys.scalar_type() == int64, "keys: expected (rows,) int64");
  STD_TORCH_CHECK(steps.dim() == 1 && steps.scalar_type() == int64 && steps.is_cpu() &&
                      steps.size(0) == keys.size(0),
                  "steps: expected int64 on the CPU, one for each key");
  STD_TORCH_CHECK(count >= 0, "count: expected 0 or more, got ", count);
  const int64_t rows = keys.size(0);
  Tensor out = torch::stable::new_empty(keys, {rows, count}, torch::headeronly::ScalarType::Float);
  const int64_t* key = static_cast<const int64_t*>(keys.const_data_ptr());
  const int64_t* step = static_cast<const int64_t*>(steps.const_data_ptr());
  const int64_t key_stride = keys.stride(0);
  const int64_t step_stride = steps.stride(0);
  float* values = static_cast<float*>(out.mutable_data_ptr());

  const int64_t tiles = (count + 4 * kTile - 1) / (4 * kTile);
  torch::stable::parallel_for(0, rows * tiles, kGrain, [&](int64_t begin, int64_t end) {
    uint32_t words[4 * kTile];
    float normals[4 * kTile];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / tiles;
      const int64_t tile = task % tiles;
      const uint64_t k = static_cast<uint64_t>(key[row * key_stride]);
      const Stream stream{static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32),
                          static_cast<uint32_t>(step[row * step_stride]),
                          static_cast<uint32_t>(purpose)};
      philox_tile(stream, static_cast<uint64_t>(tile) * kTile, words);
      transform_tile(words, normals);
      const int64_t first = tile * 4 * kTile;
      const int64_t kept = std::min(count - first, 4 * kTile);
      std::copy_n(normals, kept, values + row * count + first);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) { m.impl("normal", TORCH_BOX(&normal)); }
