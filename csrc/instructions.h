// The choice among implementations by the processor's instructions.
#pragma once

#include <vector>

#include "lanes.h"
#include "processor.h"

namespace heatsink {

// The fastest of what the processor can run, or the one that the environment's HEATSINK_CPU names.
// avx512 and avx2 are null where they were not compiled; what has no `amx` of its own, which has
// matrix products alone, runs AVX-512 beside it.
template <typename Kernel>
Kernel choose_instructions(Kernel avx512, Kernel avx2, Kernel portable, Kernel amx = nullptr) {
  std::vector<Choice<Kernel>> found;
#ifdef HEATSINK_X86_KERNELS
  if (has_amx()) {
    found.push_back({"amx", amx == nullptr ? avx512 : amx});
  }
  if (has_avx512()) {
    found.push_back({"avx512", avx512});
  }
  if (has_avx2()) {
    found.push_back({"avx2", avx2});
  }
#else
  (void)avx512;
  (void)avx2;
  (void)amx;
#endif
  found.push_back({"portable", portable});
  return choose(found).kernel;
}

}  // namespace heatsink

// The implementation to use of `name`, of which there is one for every set of instructions.
#ifdef HEATSINK_X86_KERNELS
#define HEATSINK_CHOOSE(name)                                                     \
  heatsink::choose_instructions(&heatsink::name##_avx512, &heatsink::name##_avx2, \
                                &heatsink::name##_portable)
#else
#define HEATSINK_CHOOSE(name)                                                           \
  heatsink::choose_instructions<decltype(&heatsink::name##_portable)>(nullptr, nullptr, \
                                                                      &heatsink::name##_portable)
#endif
