// The kernel of lora_rows in AVX2 and FMA: a vector of 16 floats is two registers.

#include "lora_rows.h"

#ifdef HEATSINK_X86_KERNELS

#include <cstdint>
#include <cstring>

// After the standard headers, whose inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "lanes_avx2.h"
#include "lora_rows_kernel.h"

namespace heatsink {

void lora_rows_avx2(const LoraRows& c, LoraStep step, int64_t begin, int64_t end, float* scratch) {
  run_lora_rows<Avx2>(c, step, begin, end, scratch);
}

}  // namespace heatsink

#endif
