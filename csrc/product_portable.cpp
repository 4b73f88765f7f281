// The product's kernel in plain C++, for processors that have no kernel of their own.

#include <cstdint>
#include <cstring>

#include "flush.h"
#include "fused.h"
#include "product.h"
#include "product_kernel.h"

namespace heatsink {
namespace {

struct Portable {
  struct V {
    float lane[kLanes];
  };
  static constexpr int kVectors = 1;
  static constexpr int kFloatRows = 4;
  static constexpr int kPairRows = 2;

  template <typename Lane>
  static V each(const Lane& of) {
    V a;
    for (int64_t j = 0; j < kLanes; ++j) {
      a.lane[j] = of(j);
    }
    return a;
  }
  static V load(const float* p) {
    return each([&](int64_t j) { return p[j]; });
  }
  static void store(float* p, const V& a) { std::memcpy(p, a.lane, sizeof a.lane); }
  static V splat(float a) {
    return each([&](int64_t) { return a; });
  }
  static V add(const V& a, const V& b) {
    return each([&](int64_t j) { return a.lane[j] + b.lane[j]; });
  }
  static V fma(const V& a, const V& b, const V& c) {
    return each([&](int64_t j) { return fused(a.lane[j], b.lane[j], c.lane[j]); });
  }
  // The float whose upper half is the bfloat16 at p.
  static float widen(const char* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return float_of_bits(static_cast<uint32_t>(bits) << 16);
  }
  static void split(const char* p, V& even, V& odd) {
    even = each([&](int64_t j) { return widen(p + 4 * j); });
    odd = each([&](int64_t j) { return widen(p + 4 * j + 2); });
  }
  static void split_splat(const char* p, V& even, V& odd) {
    even = splat(widen(p));
    odd = splat(widen(p + 2));
  }
  static void narrow(const Vector& x, char* to) { narrow_bfloat16(x, to); }
};

}  // namespace

void product_portable(const Product& p, int64_t task, char* scratch) {
  if (p.bfloat16) {
    const FlushDenormals flush;
    run_task<Bfloat16Pairs<Portable>>(p, task, scratch);
  } else {
    run_task<Float<Portable>>(p, task, scratch);
  }
}

}  // namespace heatsink
