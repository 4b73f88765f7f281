// heatsink::lora_linear_packed on the CPU: a linear layer whose rows' adapters come before its
// activation.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>

#include "lora_terms.h"
#include "product_run.h"
#include "recorder.h"
#include "scratch.h"

namespace {

using heatsink::LoraTerms;
using heatsink::Product;
using torch::stable::Tensor;
using Given = std::optional<Tensor>;

constexpr int64_t kTermFloats = 1 << 22;  // of terms at a time; no bits depend on it
constexpr int64_t kFewRows = 192;         // but not fewer rows, which share the weight's reading

int64_t bytes_of(const Product& p) { return p.bfloat16 ? 2 : 4; }

// Rows `first` to `first + rows` of a product.
Product part_of(const Product& p, int64_t first, int64_t rows) {
  Product part = p;
  part.rows = part.width = part.out_width = rows;
  part.images[0].data += first * p.images[0].pixel;
  part.out += first * p.out_step;
  if (p.residual.data != nullptr) {
    part.residual.data += first * p.residual.step;
  }
  if (p.sample_add.data != nullptr) {
    part.sample_add.data += first / p.sample_rows * p.sample_add.step;
  }
  return part;
}

// What terms are added to: the sample's own addend, or -0.0, which changes no number that it is
// added to.
void begin_terms(const Product& p, int64_t sample, int64_t tokens, char* to) {
  const int64_t width = p.columns * bytes_of(p);
  if (p.sample_add.data != nullptr) {
    for (int64_t t = 0; t < tokens; ++t) {
      std::memcpy(to + t * width, p.sample_add.data + sample * p.sample_add.step,
                  static_cast<size_t>(width));
    }
  } else if (p.bfloat16) {
    std::fill_n(reinterpret_cast<uint16_t*>(to), tokens * p.columns, uint16_t{0x8000});
  } else {
    std::fill_n(reinterpret_cast<float*>(to), tokens * p.columns, -0.0f);
  }
}

// Samples `begin` to `end`, all of them with adapters.
void run_adapted(const Product& p, const LoraTerms& terms, int64_t begin, int64_t end,
                 Tensor& scratch) {
  const int64_t width = p.columns * bytes_of(p);
  const int64_t last = end * p.sample_rows;
  const int64_t block =
      std::min(last - begin * p.sample_rows, std::max(kFewRows, kTermFloats / p.columns));
  for (int64_t first = begin * p.sample_rows; first < last; first += block) {
    const int64_t rows = std::min(block, last - first);
    char* const sums =
        reinterpret_cast<char*>(heatsink::thread_scratch((rows * width + 3) / 4, heatsink::kTerms));
    for (int64_t row = first; row < first + rows;) {
      const int64_t sample = row / p.sample_rows, token = row % p.sample_rows;
      const int64_t tokens = std::min(p.sample_rows - token, first + rows - row);
      char* const own = sums + (row - first) * width;
      begin_terms(p, sample, tokens, own);
      terms.add(sample, token, tokens, own);
      row += tokens;
    }
    Product part = part_of(p, first, rows);
    part.sample_add = {sums, width};
    part.sample_rows = 1;
    heatsink::run_in(part, scratch);
  }
}

// x: (R, ..., K), the weight packed, out (R, ..., N); a: (S, rank, K), b: (S, rank, columns); slots
// and scales: (R, n).
void lora_linear_packed(Tensor x, Tensor weight, Given bias, Given residual, Given sample_add,
                        std::string activation, Tensor a, Tensor b, Tensor slots, Tensor scales,
                        Given ranks, Tensor scratch, Tensor out) {
  if (out.numel() == 0) {
    return;
  }
  const Product p =
      heatsink::linear_product(x, weight, bias, residual, sample_add, activation, out);
  STD_TORCH_CHECK(x.dim() > 1 && b.size(b.dim() - 1) == p.columns, "b: expected (S, rank, ",
                  p.columns, ")");
  const LoraTerms terms(x, a, b, slots, scales, ranks);
  const int64_t samples = x.size(0);
  for (int64_t begin = 0, end; begin < samples; begin = end) {
    for (end = begin + 1; end < samples && terms.has(end) == terms.has(begin); ++end) {
    }
    if (terms.has(begin)) {
      run_adapted(p, terms, begin, end, scratch);
    } else {
      Product part = part_of(p, begin * p.sample_rows, (end - begin) * p.sample_rows);
      heatsink::run_in(part, scratch);
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) {
  m.impl("lora_linear_packed", HEATSINK_RECORDABLE(lora_linear_packed));
}
