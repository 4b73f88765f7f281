// Vectors of 16 floats in plain C++.

#pragma once

#include <cstdint>
#include <cstring>

#include "fused.h"
#include "lanes.h"

namespace heatsink {
namespace {

template <typename To, typename From>
To bits_as(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float float_of_bfloat16(uint16_t x) { return bits_as<float>(uint32_t{x} << 16); }

inline uint16_t bfloat16_of(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}

inline float float_of_half(uint16_t x) {
  const uint32_t magnitude = x & 0x7FFFu;
  const uint32_t sign = (x & 0x8000u) << 16;
  if (magnitude < 0x400u) {
    const float small = static_cast<float>(magnitude) * 0x1p-24f;
    return bits_as<float>(bits_as<uint32_t>(small) | sign);
  }
  const uint32_t rebias = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;
  return bits_as<float>(((magnitude << 13) + rebias) | sign);
}

inline uint16_t half_of(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t half = 0x7C00u;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u | (magnitude >> 13 & 0x3FFu);
  } else if (magnitude < 0x38800000u) {
    // One half's last place is that of subnormal fp16, so the addition does the rounding.
    half = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
  } else if (magnitude < 0x477FF000u) {
    half = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

struct Portable {
  struct V {
    float lane[kLanes];
  };
  static constexpr int kAccumulators = 4;
  static constexpr int kGroups = 1;
  static constexpr int kRows = 4;  // of a merge, with one vector each
  static constexpr int kVectors = 1;

  template <typename F>
  static V map(F f) {
    V out;
    for (int64_t i = 0; i < kLanes; ++i) {
      out.lane[i] = f(i);
    }
    return out;
  }
  static V load(const float* p) {
    return map([&](int64_t i) { return p[i]; });
  }
  static void store(float* p, const V& a) { std::memcpy(p, a.lane, sizeof a.lane); }
  static V splat(float a) {
    return map([&](int64_t) { return a; });
  }
  static V add(const V& a, const V& b) {
    return map([&](int64_t i) { return a.lane[i] + b.lane[i]; });
  }
  static V sub(const V& a, const V& b) {
    return map([&](int64_t i) { return a.lane[i] - b.lane[i]; });
  }
  static V mul(const V& a, const V& b) {
    return map([&](int64_t i) { return a.lane[i] * b.lane[i]; });
  }
  static V div(const V& a, const V& b) {
    return map([&](int64_t i) { return a.lane[i] / b.lane[i]; });
  }
  static V fma(const V& a, const V& b, const V& c) {
    return map([&](int64_t i) { return fused(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static V max(const V& a, const V& b) {
    return map([&](int64_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static V where_equal(const V& a, const V& b, const V& yes, const V& no) {
    return map([&](int64_t i) { return a.lane[i] == b.lane[i] ? yes.lane[i] : no.lane[i]; });
  }
  static V where_below(int64_t lane, const V& yes, const V& no) {
    return map([&](int64_t i) { return i < lane ? yes.lane[i] : no.lane[i]; });
  }
  static V times_power(const V& a, const V& shifted) {
    uint32_t bits[kLanes];
    uint32_t exponents[kLanes];
    std::memcpy(bits, a.lane, sizeof bits);
    std::memcpy(exponents, shifted.lane, sizeof exponents);
    for (int64_t i = 0; i < kLanes; ++i) {
      bits[i] += exponents[i] << 23;
    }
    V out;
    std::memcpy(out.lane, bits, sizeof bits);
    return out;
  }
  static V times_power_above(const V& a, const V& shifted, const V& x, const V& y) {
    const V product = times_power(a, shifted);
    return map([&](int64_t i) { return x.lane[i] <= y.lane[i] ? 0.0f : product.lane[i]; });
  }
  static void split(const char* p, V& even, V& odd) {
    even = map([&](int64_t i) { return float_of_bfloat16(element(p, 2 * i)); });
    odd = map([&](int64_t i) { return float_of_bfloat16(element(p, 2 * i + 1)); });
  }
  static void split_splat(const char* p, V& even, V& odd) {
    even = splat(float_of_bfloat16(element(p, 0)));
    odd = splat(float_of_bfloat16(element(p, 1)));
  }
  static void interleave(const char* even, const char* odd, char* p) {
    for (int64_t i = 0; i < kLanes; ++i) {
      std::memcpy(p + 4 * i, even + 2 * i, 2);
      std::memcpy(p + 4 * i + 2, odd + 2 * i, 2);
    }
  }
  static void join(const V& even, const V& odd, char* p) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint32_t low = (bits_as<uint32_t>(even.lane[i]) + 0x8000u) >> 16;
      const uint32_t high = (bits_as<uint32_t>(odd.lane[i]) + 0x8000u) & 0xFFFF0000u;
      const uint32_t pair = low | high;
      std::memcpy(p + 4 * i, &pair, sizeof pair);
    }
  }
  static uint16_t element(const char* p, int64_t i) {
    uint16_t x;
    std::memcpy(&x, p + 2 * i, sizeof x);
    return x;
  }
  static V widen_half(const char* p) {
    return map([&](int64_t i) { return float_of_half(element(p, i)); });
  }
  static V widen_bfloat16(const char* p) {
    return map([&](int64_t i) { return float_of_bfloat16(element(p, i)); });
  }
  static void narrow_half(const V& a, char* p) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint16_t x = half_of(a.lane[i]);
      std::memcpy(p + 2 * i, &x, sizeof x);
    }
  }
  static void narrow_bfloat16(const V& a, char* p) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint16_t x = bfloat16_of(a.lane[i]);
      std::memcpy(p + 2 * i, &x, sizeof x);
    }
  }
  static void stream(const char* from, char* to, int64_t bytes) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
  static void fence() {}
  static V gather(const float* p, int64_t pitch) {
    return map([&](int64_t i) { return p[i / 4 * 4 * pitch + i % 4]; });
  }
  static void scatter(float* p, int64_t pitch, const V& a) {
    for (int64_t i = 0; i < kLanes; ++i) {
      p[i / 4 * 4 * pitch + i % 4] = a.lane[i];
    }
  }
  static void transpose(V (&a)[4]) {
    const V b[4] = {a[0], a[1], a[2], a[3]};
    for (int64_t row = 0; row < 4; ++row) {
      a[row] = map([&](int64_t i) { return b[i % 4].lane[i / 4 * 4 + row]; });
    }
  }
};

}  // namespace
}  // namespace heatsink
