// Denormal numbers taken and given as 0 for a while, as AMX does.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace heatsink {
namespace {

class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushDenormals() {}
#endif
};

}  // namespace
}  // namespace heatsink
