// What the ops that are products share: arguments, the partition into tasks, and the threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "product.h"

namespace heatsink {

using torch::stable::Tensor;

constexpr int64_t kUneven = -1;

// Bytes between x's rows of `width` elements, which walk along the dimensions in `order`, slowest
// first; kUneven if they do not lie evenly.
int64_t row_step(const Tensor& x, const int* order, int dims, int64_t width);

// Sets the dtype, the weight, and of the epilogue what is alike for all products; checks them.
// `x` is the left side, and the weight one that `packed` gave.
void set_product(Product& p, const Tensor& x, const Tensor& weight,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& sample_add,
                 const std::string& activation);

// The product of a linear layer: every tensor with dense and evenly spaced rows, the weight packed.
// `out` has elements.
Product linear_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual,
                       const std::optional<Tensor>& sample_add, const std::string& activation,
                       Tensor& out);

// Copies what is given if its last dimension is not dense.
void make_dense(std::optional<Tensor>& given);

// A weight (columns, depth) or (columns, channels, height, width) packed into a new tensor.
Tensor packed(const Tensor& weight, bool geglu);

// Runs the product in memory that threads keep.
void run(Product& p);

// Runs the product in the given memory, kScratchBytes for a thread; allocates nothing.
void run_in(Product& p, Tensor& scratch);

}  // namespace heatsink
