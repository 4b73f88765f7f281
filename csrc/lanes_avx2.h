// Vectors of 16 floats in AVX2 and FMA: two registers.
//
// Included where the instruction set was raised, after <immintrin.h>; no standard header here.

#pragma once

#include "lanes.h"

namespace heatsink {
namespace {

struct Avx2 {
  struct V {
    __m256 low, high;
  };
  static constexpr int kAccumulators = 4;
  static constexpr int kGroups = 1;
  static constexpr int kRows = 4;  // of a merge, with one vector each
  static constexpr int kVectors = 1;

  static V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, V a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
  }
  static V splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
  static V add(V a, V b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static V sub(V a, V b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static V mul(V a, V b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static V div(V a, V b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
  static V max(V a, V b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  static V fma(V a, V b, V c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static V where_equal(V a, V b, V yes, V no) {
    return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ)),
            _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ))};
  }
  static V where_below(int64_t lane, V yes, V no) {
    const __m256 edge = _mm256_set1_ps(static_cast<float>(lane));
    const __m256 low = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 high = _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(low, edge, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(high, edge, _CMP_LT_OQ))};
  }
  static __m256 times_power(__m256 a, __m256 shifted) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
  }
  static V times_power(V a, V shifted) {
    return {times_power(a.low, shifted.low), times_power(a.high, shifted.high)};
  }
  static __m256 above(__m256 a, __m256 x, __m256 y) {
    return _mm256_and_ps(a, _mm256_cmp_ps(x, y, _CMP_NLE_UQ));
  }
  static V times_power_above(V a, V shifted, V x, V y) {
    const V product = times_power(a, shifted);
    return {above(product.low, x.low, y.low), above(product.high, x.high, y.high)};
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
  static void interleave(const char* evens, const char* odds, char* p) {
    for (int64_t i = 0; i < 32; i += 16) {
      const __m256i a = _mm256_cvtepu16_epi32(load_half(evens + i));
      const __m256i b = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(odds + i)), 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 2 * i), _mm256_or_si256(a, b));
    }
  }
  static void join(__m256 even, __m256 odd, char* p) {
    const __m256i half = _mm256_set1_epi32(0x8000);
    const __m256i low = _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(even), half), 16);
    const __m256i high = _mm256_and_si256(_mm256_add_epi32(_mm256_castps_si256(odd), half),
                                          _mm256_set1_epi32(-0x10000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(low, high));
  }
  static void join(V evens, V odds, char* p) {
    join(evens.low, odds.low, p);
    join(evens.high, odds.high, p + 32);
  }
  static __m128i load_half(const char* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static V widen_half(const char* p) {
    return {_mm256_cvtph_ps(load_half(p)), _mm256_cvtph_ps(load_half(p + 16))};
  }
  static V widen_bfloat16(const char* p) {
    const __m256i low = _mm256_cvtepu16_epi32(load_half(p));
    const __m256i high = _mm256_cvtepu16_epi32(load_half(p + 16));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
  }
  static void narrow_half(V a, char* p) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.low, kMode));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm256_cvtps_ph(a.high, kMode));
  }
  static __m256i rounded(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0),
                              _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
  }
  static void narrow_bfloat16(V a, char* p) {
    const __m256i packed = _mm256_packus_epi32(rounded(a.low), rounded(a.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
  }
  // Copies a multiple of 32 bytes to an address that is one too, past the caches.
  static void stream(const char* from, char* to, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 32) {
      const __m256i part = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), part);
    }
  }
  static void fence() { _mm_sfence(); }
  static V gather(const float* p, int64_t pitch) {
    return {_mm256_loadu2_m128(p + 4 * pitch, p),
            _mm256_loadu2_m128(p + 12 * pitch, p + 8 * pitch)};
  }
  static void scatter(float* p, int64_t pitch, V a) {
    _mm256_storeu2_m128(p + 4 * pitch, p, a.low);
    _mm256_storeu2_m128(p + 12 * pitch, p + 8 * pitch, a.high);
  }
  static void transpose(__m256& a, __m256& b, __m256& c, __m256& d) {
    const __m256d t0 = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
    const __m256d t1 = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
    const __m256d t2 = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d t3 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    a = _mm256_castpd_ps(_mm256_unpacklo_pd(t0, t2));
    b = _mm256_castpd_ps(_mm256_unpackhi_pd(t0, t2));
    c = _mm256_castpd_ps(_mm256_unpacklo_pd(t1, t3));
    d = _mm256_castpd_ps(_mm256_unpackhi_pd(t1, t3));
  }
  static void transpose(V (&a)[4]) {
    transpose(a[0].low, a[1].low, a[2].low, a[3].low);
    transpose(a[0].high, a[1].high, a[2].high, a[3].high);
  }
};

}  // namespace
}  // namespace heatsink
