// The product's kernel for bfloat16 in AMX: tiles of 16 rows by 16 columns, 32 products deep.

#include "product.h"

#ifdef HEATSINK_X86_KERNELS

#include <cstdint>
#include <cstring>

// After the standard headers, whose inline functions must stay runnable everywhere.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#pragma GCC target("prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "amx_tiles.h"
#include "flush.h"
#include "product_kernel.h"

namespace heatsink {
namespace {

struct Amx {
  static constexpr bool kBfloat16 = true;
  static constexpr bool kPrefetches = true;
  static constexpr int64_t kRows = 2 * kLanes;
  static constexpr int64_t kGranule = kLanes;

  static int64_t steps(int64_t depth) { return depth / kTile; }
  // What is done aside comes between the products, which leave the vector units idle.
  static void multiply(int64_t rows, const char* a, int64_t pitch, const char* b, int64_t width,
                       int64_t depth, float* c, bool first, Aside<Amx>& aside) {
    if (rows > kLanes) {
      if (width == kPanel) {
        tiles<2, 2, true>(a, pitch, b, depth, c, first, aside);
      } else {
        tiles<2, 1, true>(a, pitch, b, depth, c, first, aside);
      }
    } else if (width == kPanel) {
      tiles<1, 2, true>(a, pitch, b, depth, c, first, aside);
    } else {
      tiles<1, 1, true>(a, pitch, b, depth, c, first, aside);
    }
    aside.finish();
  }
  static void narrow(const Vector& x, char* to) {
    const __m256bh halves = _mm512_cvtneps_pbh(x);
    std::memcpy(to, &halves, sizeof halves);
  }
};

}  // namespace

void product_amx(const Product& p, int64_t task, char* scratch) {
  const FlushDenormals flush;
  const Tiles tiles;
  run_task<Amx>(p, task, scratch);
}

}  // namespace heatsink

#endif
