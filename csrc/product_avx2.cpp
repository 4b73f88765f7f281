// The product's kernel in AVX2 and FMA: a vector of 16 floats is two registers.

#include "product.h"

#ifdef HEATSINK_X86_KERNELS

#include <cstdint>
#include <cstring>

// After the standard headers, whose inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "flush.h"
#include "lanes_avx2.h"
#include "product_kernel.h"

namespace heatsink {
namespace {

struct Products : Avx2 {
  static constexpr int kFloatRows = 6;
  static constexpr int kPairRows = 2;

  static void narrow(const Vector& x, char* to) { heatsink::narrow_bfloat16(x, to); }
};

}  // namespace

void product_avx2(const Product& p, int64_t task, char* scratch) {
  if (p.bfloat16) {
    const FlushDenormals flush;
    run_task<Bfloat16Pairs<Products>>(p, task, scratch);
  } else {
    run_task<Float<Products>>(p, task, scratch);
  }
}

}  // namespace heatsink

#endif
