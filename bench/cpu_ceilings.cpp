// What this processor's units do at best, in registers alone: compiled and called by
// bench/cpu_products.py. Each function returns the floating-point operations that it did.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

extern "C" {

// Fused multiply-adds of 16 floats, 24 of them independent of each other.
__attribute__((target("avx512f"))) double fma_avx512(int64_t rounds) {
  register __m512 x asm("zmm30") = _mm512_set1_ps(0.999f);
  register __m512 y asm("zmm31") = _mm512_set1_ps(0.001f);
#define FMA(n) "vfmadd213ps %1, %0, %%zmm" #n "\n"
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile(FMA(0) FMA(1) FMA(2) FMA(3) FMA(4) FMA(5) FMA(6) FMA(7) FMA(8) FMA(9) FMA(10)
                     FMA(11) FMA(12) FMA(13) FMA(14) FMA(15) FMA(16) FMA(17) FMA(18) FMA(19) FMA(20)
                         FMA(21) FMA(22) FMA(23)
                 : "+v"(x), "+v"(y)::"zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7",
                   "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16",
                   "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23");
  }
  return 24.0 * 2 * 16 * static_cast<double>(rounds);
}

// Products of tiles, four of them independent of each other.
__attribute__((target("amx-tile,amx-bf16"))) double amx_bfloat16(int64_t rounds) {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) {
    return 0.0;
  }
  alignas(64) uint8_t config[64] = {1};
  for (int tile = 0; tile < 8; ++tile) {
    config[16 + 2 * tile] = 64;
    config[48 + tile] = 16;
  }
  // The compiler takes it for a pointer's size of memory, and drops the rest.
  __asm__ volatile("" : : "r"(config) : "memory");
  _tile_loadconfig(config);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 2 * 16 * 16 * 32 * static_cast<double>(rounds);
}
}
