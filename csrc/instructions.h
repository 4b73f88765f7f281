// The choice among implementations by the processor's instructions.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "lanes.h"

namespace heatsink {

// The fastest of what the processor can run, or the one that the environment's HEATSINK_CPU names.
// All give the same bits, which is tested by naming them. avx512 and avx2 are null where they were
// not compiled.
template <typename Kernel>
Kernel choose_instructions(Kernel avx512, Kernel avx2, Kernel portable) {
  std::vector<std::pair<std::string, Kernel>> found;
#ifdef HEATSINK_X86_KERNELS
  const bool two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c");
  if (two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.emplace_back("avx512", avx512);
  }
  if (two) {
    found.emplace_back("avx2", avx2);
  }
#else
  (void)avx512;
  (void)avx2;
#endif
  found.emplace_back("portable", portable);
  const char* wish = std::getenv("HEATSINK_CPU");
  if (wish == nullptr || *wish == '\0') {
    return found.front().second;
  }
  std::string names;
  for (const auto& [name, kernel] : found) {
    if (name == wish) {
      return kernel;
    }
    names += (names.empty() ? "" : ", ") + name;
  }
  STD_TORCH_CHECK(false, "HEATSINK_CPU: expected one of ", names, " on this processor, got ", wish);
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
