// Vectors of 16 floats in AVX-512: one register.
//
// Included where the instruction set was raised, after <immintrin.h>; no standard header here.

#pragma once

#include "lanes.h"

namespace heatsink {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int kAccumulators = 16;
  static constexpr int kGroups = 2;
  static constexpr int kRows = 8;  // of a merge, with two vectors each
  static constexpr int kVectors = 2;

  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static V splat(float a) { return _mm512_set1_ps(a); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V where_equal(V a, V b, V yes, V no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), yes);
  }
  static V where_below(int64_t lane, V yes, V no) {
    return _mm512_mask_mov_ps(no, static_cast<__mmask16>((1u << lane) - 1), yes);
  }
  static V times_power(V a, V shifted) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), exponent));
  }
  // What lies at even and at odd places of 32 bfloat16.
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
  // 16 bfloat16 of each, side by side in pairs.
  static void interleave(const char* even, const char* odd, char* p) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd));
    _mm512_storeu_si512(p, _mm512_or_si512(_mm512_cvtepu16_epi32(a),
                                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)));
  }
  // Two vectors in pairs, rounded to nearest, ties upwards in magnitude; NaN stays one.
  static void join(V even, V odd, char* p) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    // low | (high & mask)
    const __m512i pairs = _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi32(-0x10000), 0xF8);
    _mm512_storeu_si512(p, pairs);
  }
  // a * 2^n where not x <= y, else 0; `shifted` is as times_power has it.
  static V times_power_above(V a, V shifted, V x, V y) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(_mm512_cmp_ps_mask(x, y, _CMP_NLE_UQ),
                                                      _mm512_castps_si512(a), exponent));
  }
  static V widen_half(const char* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V widen_bfloat16(const char* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void narrow_half(V a, char* p) {
    const __m256i bits = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
  }
  static void narrow_bfloat16(V a, char* p) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __m512i rounded =
        _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q),
                              _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
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
    __m512 a = _mm512_castps128_ps512(_mm_loadu_ps(p));
    a = _mm512_insertf32x4(a, _mm_loadu_ps(p + 4 * pitch), 1);
    a = _mm512_insertf32x4(a, _mm_loadu_ps(p + 8 * pitch), 2);
    return _mm512_insertf32x4(a, _mm_loadu_ps(p + 12 * pitch), 3);
  }
  static void scatter(float* p, int64_t pitch, V a) {
    _mm_storeu_ps(p, _mm512_castps512_ps128(a));
    _mm_storeu_ps(p + 4 * pitch, _mm512_extractf32x4_ps(a, 1));
    _mm_storeu_ps(p + 8 * pitch, _mm512_extractf32x4_ps(a, 2));
    _mm_storeu_ps(p + 12 * pitch, _mm512_extractf32x4_ps(a, 3));
  }
  static void transpose(V (&a)[4]) {
    const __m512d t0 = _mm512_castps_pd(_mm512_unpacklo_ps(a[0], a[1]));
    const __m512d t1 = _mm512_castps_pd(_mm512_unpackhi_ps(a[0], a[1]));
    const __m512d t2 = _mm512_castps_pd(_mm512_unpacklo_ps(a[2], a[3]));
    const __m512d t3 = _mm512_castps_pd(_mm512_unpackhi_ps(a[2], a[3]));
    a[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(t0, t2));
    a[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(t0, t2));
    a[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(t1, t3));
    a[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(t1, t3));
  }
};

}  // namespace
}  // namespace heatsink
