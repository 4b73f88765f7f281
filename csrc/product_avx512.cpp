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
#include "lanes_avx512.h"
#include "product_kernel.h"

namespace heatsink {
namespace {

struct Products : Avx512 {
  static constexpr int kFloatRows = 14;
  static constexpr int kPairRows = 6;

  static void narrow(const Vector& x, char* to) { heatsink::narrow_bfloat16(x, to); }
};

}  // namespace

void product_avx512(const Product& p, int64_t task, char* scratch) {
  if (p.bfloat16) {
    const FlushDenormals flush;
    run_task<Bfloat16Pairs<Products>>(p, task, scratch);
  } else {
    run_task<Float<Products>>(p, task, scratch);
  }
}

}  // namespace heatsink

#endif
