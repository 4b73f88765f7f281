// What the adapters of rows add to a linear layer's result, block of tokens by block, for an op
// that has more to do with it (csrc/lora_linear.cpp). csrc/lora_rows.cpp has the work.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace heatsink {

class LoraTerms {
 public:
  using Tensor = torch::stable::Tensor;

  // x: (R, ..., in) with evenly spaced tokens; a: (S, rank, in); b: (S, rank, out); the others as
  // heatsink::lora_rows takes them. The tensors outlive this.
  LoraTerms(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& slots,
            const Tensor& scales, const std::optional<Tensor>& ranks);
  ~LoraTerms();

  // Whether a sample has adapters.
  bool has(int64_t sample) const { return places_[sample] >= 0; }

  // Adds to dense tokens (tokens, out) of x's dtype, which are those of a sample from `first` on.
  void add(int64_t sample, int64_t first, int64_t tokens, char* y) const;

 private:
  struct State;

  int64_t call_bytes() const;

  std::unique_ptr<State> state_;
  std::vector<int64_t> places_;  // by sample, among the rows with adapters; -1 of others
};

}  // namespace heatsink
