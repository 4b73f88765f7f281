// Which instructions kernels that exist for several sets run on this processor.

#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "vectors.h"

namespace heatsink {

// A kernel for a set of instructions; null where it was not built.
template <typename Kernel>
struct Kernels {
  Kernel portable, avx2, avx512;
};

// The fastest that this processor can run, or the one that the environment's HEATSINK_CPU names.
// All give the same bits, which is tested by naming them.
template <typename Kernel>
Kernel choose_kernel(const Kernels<Kernel>& kernels) {
  struct Choice {
    const char* name;
    Kernel kernel;
  };
  std::vector<Choice> found;
#ifdef HEATSINK_X86_KERNELS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back({"avx512", kernels.avx512});
  }
  if (avx2) {
    found.push_back({"avx2", kernels.avx2});
  }
#endif
  found.push_back({"portable", kernels.portable});
  const char* wish = std::getenv("HEATSINK_CPU");
  if (wish == nullptr || *wish == '\0') {
    return found.front().kernel;
  }
  std::string names;
  for (const Choice& choice : found) {
    if (std::string(wish) == choice.name) {
      return choice.kernel;
    }
    names += std::string(names.empty() ? "" : ", ") + choice.name;
  }
  STD_TORCH_CHECK(false, "HEATSINK_CPU: expected one of ", names, " on this processor, got ", wish);
}

}  // namespace heatsink
