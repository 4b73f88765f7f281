// heatsink::linear and heatsink::linear_packed on the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "float_tensor.h"
#include "product_run.h"
#include "recorder.h"

namespace {

using heatsink::Product;
using Given = std::optional<Tensor>;

// Bytes between the rows of (..., width), or kUneven.
int64_t steps(const Tensor& x) {
  std::vector<int> order;
  const int last = static_cast<int>(x.dim()) - 1;
  for (int d = 0; d < last; ++d) {
    order.push_back(d);
  }
  if (x.size(last) > 1 && x.stride(last) != 1) {
    return heatsink::kUneven;
  }
  return heatsink::row_step(x, order.data(), last, x.size(last));
}

// Rows of `x` and everything but weight and result.
void set_rows(Product& p, const Tensor& x) {
  p.depth = x.size(x.dim() - 1);
  p.rows = x.numel() / p.depth;
  const int64_t step = steps(x);
  STD_TORCH_CHECK(step != heatsink::kUneven, "x: expected evenly spaced dense rows");
  p.images[0] = {static_cast<const char*>(x.const_data_ptr()), p.depth, 0, 0, step};
  p.height = p.out_height = p.kernel_width = p.stride = 1;
  p.width = p.out_width = p.rows;
  p.direct = true;
  p.sample_rows = p.rows / x.size(0);
}

void set_result(Product& p, const Given& residual, Tensor& out) {
  if (residual.has_value()) {
    STD_TORCH_CHECK(residual->is_cpu() && residual->scalar_type() == out.scalar_type() &&
                        residual->sizes().equals(out.sizes()) &&
                        steps(*residual) != heatsink::kUneven,
                    "residual: expected evenly spaced dense rows like the result's");
    p.residual = {static_cast<const char*>(residual->const_data_ptr()), steps(*residual)};
  }
  p.out_step = steps(out);
  p.out = static_cast<char*>(out.mutable_data_ptr());
}

Tensor linear(Tensor x, Tensor weight, Given bias, Given residual, Given sample_add,
              std::string activation) {
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && weight.size(1) == x.size(x.dim() - 1),
                  "weight: expected (columns, depth) with x (..., depth)");
  x = steps(x) == heatsink::kUneven ? torch::stable::contiguous(x) : x;
  const bool geglu = activation == "geglu";
  Tensor out = empty_rows(x, geglu ? weight.size(0) / 2 : weight.size(0));
  if (out.numel() == 0) {
    return out;
  }
  if (residual.has_value() && steps(*residual) == heatsink::kUneven) {
    residual = torch::stable::contiguous(*residual);
  }
  heatsink::make_dense(bias);
  heatsink::make_dense(sample_add);
  const Tensor blocks = heatsink::packed(weight, geglu);
  Product p{};
  p.columns = weight.size(0);
  set_rows(p, x);
  heatsink::set_product(p, x, blocks, bias, sample_add, activation);
  set_result(p, residual, out);
  heatsink::run(p);
  return out;
}

void linear_packed(Tensor x, Tensor weight, Given bias, Given residual, Given sample_add,
                   std::string activation, Tensor scratch, Tensor out) {
  if (out.numel() == 0) {
    return;
  }
  Product p = heatsink::linear_product(x, weight, bias, residual, sample_add, activation, out);
  heatsink::run_in(p, scratch);
}

}  // namespace

namespace heatsink {

Product linear_product(const Tensor& x, const Tensor& weight, const Given& bias,
                       const Given& residual, const Given& sample_add,
                       const std::string& activation, Tensor& out) {
  STD_TORCH_CHECK(
      x.dim() >= 1 && out.dim() == x.dim() && out.scalar_type() == x.scalar_type() && out.is_cpu(),
      "out: expected as many dimensions as x, of its dtype");
  STD_TORCH_CHECK(steps(out) != kUneven, "out: expected evenly spaced dense rows");
  Product p{};
  p.columns = out.size(out.dim() - 1) * (activation == "geglu" ? 2 : 1);
  set_rows(p, x);
  STD_TORCH_CHECK(out.numel() / out.size(out.dim() - 1) == p.rows, "out: expected x's rows");
  set_product(p, x, weight, bias, sample_add, activation);
  set_result(p, residual, out);
  return p;
}

}  // namespace heatsink

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_packed", HEATSINK_RECORDABLE(linear_packed));
  m.impl("pack_linear", TORCH_BOX(&heatsink::packed));
}
