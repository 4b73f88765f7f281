// The product's kernel in AVX2 and FMA: a vector of 16 floats is two registers.

#include "product.h"

#ifdef HEATSINK_X86_KERNELS

#include <cstdint>
#include <cstring>

// After the standard headers, whose inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "flush.h"
#include "product_kernel.h"

namespace heatsink {
namespace {

struct Avx2 {
  struct V {
    __m256 low, high;
  };
  static constexpr int kVectors = 1;
  static constexpr int kFloatRows = 6;
  static constexpr int kPairRows = 2;

  static V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, V a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
  }
  static V splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
  static V add(V a, V b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static V fma(V a, V b, V c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static __m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static __m256 odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
  }
  static void split(const char* p, V& evens, V& odds) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32));
    evens = {even(low), even(high)};
    odds = {odd(low), odd(high)};
  }
  static void split_splat(const char* p, V& evens, V& odds) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    const __m256i pairs = _mm256_set1_epi32(pair);
    evens = {even(pairs), even(pairs)};
    odds = {odd(pairs), odd(pairs)};
  }
  static void narrow(const Vector& x, char* to) { narrow_bfloat16(x, to); }
};

}  // namespace

void product_avx2(const Product& p, int64_t task, char* scratch) {
  if (p.bfloat16) {
    const FlushDenormals flush;
    run_task<Bfloat16Pairs<Avx2>>(p, task, scratch);
  } else {
    run_task<Float<Avx2>>(p, task, scratch);
  }
}

}  // namespace heatsink

#endif
