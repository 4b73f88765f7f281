// Instruction sets of the processor that this runs on, and the choice of a kernel among several.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace heatsink {

bool has_avx2();
bool has_avx512();
bool has_amx();

template <typename Kernel>
struct Choice {
  const char* name;
  Kernel kernel;
};

// The first, or the one that the environment's HEATSINK_CPU names. All give the same bits, which is
// tested by naming them.
template <typename Kernel>
Choice<Kernel> choose(const std::vector<Choice<Kernel>>& found) {
  const char* wish = std::getenv("HEATSINK_CPU");
  if (wish == nullptr || *wish == '\0') {
    return found.front();
  }
  std::string names;
  for (const Choice<Kernel>& choice : found) {
    if (std::string(wish) == choice.name) {
      return choice;
    }
    names += std::string(names.empty() ? "" : ", ") + choice.name;
  }
  STD_TORCH_CHECK(false, "HEATSINK_CPU: expected one of ", names, " on this processor, got ", wish);
}

}  // namespace heatsink
