// The attention kernel in AVX2 and FMA: a vector of 16 floats is two registers.

#include "attention.h"

#ifdef HEATSINK_X86_KERNELS

#include <cstdint>
#include <cstring>

// After the standard headers, whose inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "attention_kernel.h"
#include "attention_pairs.h"
#include "flush.h"
#include "lanes_avx2.h"

namespace heatsink {

void attention_avx2(const Attention& a, int64_t begin, int64_t end, float* scratch) {
  if (a.element == Element::BFloat16) {
    const FlushDenormals flush;
    run_pairs<VectorPairs<Avx2, 2>>(a, begin, end, scratch);
  } else {
    run_tasks<Avx2>(a, begin, end, scratch);
  }
}

}  // namespace heatsink

#endif
