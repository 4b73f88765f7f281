// The product's kernel in AVX-512: a vector of 16 floats is one register.

#include "product.h"

#ifdef HEATSINK_X86_KERNELS

#include <cstdint>
#include <cstring>

// After the standard headers, whose inline functions must stay runnable everywhere.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
// GCC 12 takes the unused operand of its own unmasked intrinsics for a variable that was not set.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "flush.h"
#include "product_kernel.h"

namespace heatsink {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int kVectors = 2;
  static constexpr int kFloatRows = 14;
  static constexpr int kPairRows = 6;

  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static V splat(float a) { return _mm512_set1_ps(a); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static void split(__m512i pairs, V& even, V& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
  }
  static void split(const char* p, V& even, V& odd) { split(_mm512_loadu_si512(p), even, odd); }
  static void split_splat(const char* p, V& even, V& odd) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    split(_mm512_set1_epi32(pair), even, odd);
  }
  static void narrow(const Vector& x, char* to) { narrow_bfloat16(x, to); }
};

}  // namespace

void product_avx512(const Product& p, int64_t task, char* scratch) {
  if (p.bfloat16) {
    const FlushDenormals flush;
    run_task<Bfloat16Pairs<Avx512>>(p, task, scratch);
  } else {
    run_task<Float<Avx512>>(p, task, scratch);
  }
}

}  // namespace heatsink

#endif
