// The merge of low-rank terms in AVX2 and FMA.

#include "lora_merge.h"

#ifdef HEATSINK_X86_KERNELS

#include <cstdint>
#include <cstring>

// After the standard headers, whose inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "lanes_avx2.h"
#include "lora_merge_kernel.h"

namespace heatsink {

void lora_merge_avx2(const Merge& merge, int64_t begin, int64_t end, float* scratch) {
  run_merge<Avx2>(merge, begin, end, scratch);
}

}  // namespace heatsink

#endif
