// heatsink::conv2d and heatsink::conv2d_packed on the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "float_tensor.h"
#include "product_run.h"
#include "recorder.h"

namespace {

using heatsink::Image;
using heatsink::Product;
using Given = std::optional<Tensor>;

// The sizes of a convolution's kernel, and how it walks.
struct Window {
  int64_t height, width, stride, padding, upsample;

  int64_t out(int64_t size, int64_t kernel) const {
    return (size * upsample + 2 * padding - kernel) / stride + 1;
  }
};

bool channels_dense(const Tensor& x) { return x.size(1) < 2 || x.stride(1) == 1; }

Tensor channels_last(const Tensor& x) {
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Bytes between the pixels of (B, C, H, W) with dense channels if they lie evenly.
int64_t steps(const Tensor& x) {
  constexpr int kPixels[] = {0, 2, 3};
  return channels_dense(x) ? heatsink::row_step(x, kPixels, 3, x.size(1)) : heatsink::kUneven;
}

Image image_of(const Tensor& x) {
  STD_TORCH_CHECK(channels_dense(x), "expected images with dense channels (channels_last)");
  const int64_t bytes = element_bytes(x.scalar_type());
  return {static_cast<const char*>(x.const_data_ptr()), x.size(1), x.stride(0) * bytes,
          x.stride(2) * bytes, x.stride(3) * bytes};
}

void set_images(Product& p, const Tensor& x, const Given& x2, const Window& window) {
  p.images[0] = image_of(x);
  if (x2.has_value()) {
    STD_TORCH_CHECK(x2->dim() == 4 && x2->is_cpu() && x2->scalar_type() == x.scalar_type() &&
                        x2->size(0) == x.size(0) && x2->size(2) == x.size(2) &&
                        x2->size(3) == x.size(3),
                    "x2: expected images like x, of its dtype");
    p.images[1] = image_of(*x2);
  }
  p.shift = window.upsample - 1;
  p.height = x.size(2) * window.upsample;
  p.width = x.size(3) * window.upsample;
  p.out_height = window.out(x.size(2), window.height);
  p.out_width = window.out(x.size(3), window.width);
  p.kernel_width = window.width;
  p.stride = window.stride;
  p.padding = window.padding;
  p.rows = x.size(0) * p.out_height * p.out_width;
  p.depth = window.height * window.width * (p.images[0].channels + p.images[1].channels);
  p.sample_rows = p.out_height * p.out_width;
  const int64_t step = steps(x);
  p.direct = !x2.has_value() && window.height == 1 && window.width == 1 && window.stride == 1 &&
             window.padding == 0 && window.upsample == 1 && step != heatsink::kUneven;
  p.images[0].pixel = p.direct ? step : p.images[0].pixel;
}

void set_result(Product& p, const Given& residual, Tensor& out) {
  if (residual.has_value()) {
    STD_TORCH_CHECK(residual->is_cpu() && residual->scalar_type() == out.scalar_type() &&
                        residual->sizes().equals(out.sizes()) &&
                        steps(*residual) != heatsink::kUneven,
                    "residual: expected the result's shape in channels_last memory");
    p.residual = {static_cast<const char*>(residual->const_data_ptr()), steps(*residual)};
  }
  p.out_step = steps(out);
  p.out = static_cast<char*>(out.mutable_data_ptr());
}

void check_window(const Tensor& x, const Window& window) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected (batch, channels, height, width)");
  STD_TORCH_CHECK(window.height > 0 && window.width > 0 && window.stride > 0 &&
                      window.padding >= 0 && (window.upsample == 1 || window.upsample == 2),
                  "expected a positive stride, no negative padding, and upsample 1 or 2");
  STD_TORCH_CHECK(x.size(2) * window.upsample + 2 * window.padding >= window.height &&
                      x.size(3) * window.upsample + 2 * window.padding >= window.width,
                  "x: expected images no smaller than the kernel");
}

Tensor conv2d(Tensor x, Given x2, Tensor weight, Given bias, Given residual, Given sample_add,
              int64_t stride, int64_t padding, int64_t upsample, std::string activation) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight: expected (columns, channels, height, width)");
  const Window window{weight.size(2), weight.size(3), stride, padding, upsample};
  check_window(x, window);
  STD_TORCH_CHECK(weight.size(1) == x.size(1) + (x2.has_value() ? x2->size(1) : 0),
                  "weight: expected the images' channels");
  const bool geglu = activation == "geglu";
  const int64_t columns = geglu ? weight.size(0) / 2 : weight.size(0);
  const int64_t height = window.out(x.size(2), window.height);
  const int64_t width = window.out(x.size(3), window.width);
  Tensor out = empty_strided(x, {x.size(0), columns, height, width},
                             {columns * height * width, 1, columns * width, columns});
  if (out.numel() == 0) {
    return out;
  }
  x = channels_dense(x) ? x : channels_last(x);
  if (x2.has_value() && !channels_dense(*x2)) {
    x2 = channels_last(*x2);
  }
  if (residual.has_value() && steps(*residual) == heatsink::kUneven) {
    residual = channels_last(*residual);
  }
  heatsink::make_dense(bias);
  heatsink::make_dense(sample_add);
  const Tensor blocks = heatsink::packed(weight, geglu);
  Product p{};
  p.columns = weight.size(0);
  set_images(p, x, x2, window);
  heatsink::set_product(p, x, blocks, bias, sample_add, activation);
  set_result(p, residual, out);
  heatsink::run(p);
  return out;
}

void conv2d_packed(Tensor x, Given x2, Tensor weight, Given bias, Given residual, Given sample_add,
                   int64_t kernel_height, int64_t kernel_width, int64_t stride, int64_t padding,
                   int64_t upsample, std::string activation, Tensor scratch, Tensor out) {
  const Window window{kernel_height, kernel_width, stride, padding, upsample};
  check_window(x, window);
  STD_TORCH_CHECK(out.is_cpu() && out.dim() == 4 && out.scalar_type() == x.scalar_type() &&
                      out.size(0) == x.size(0) &&
                      out.size(2) == window.out(x.size(2), kernel_height) &&
                      out.size(3) == window.out(x.size(3), kernel_width),
                  "out: expected the result's shape, of x's dtype");
  if (out.numel() == 0) {
    return;
  }
  STD_TORCH_CHECK(steps(out) != heatsink::kUneven, "out: expected channels_last memory");
  Product p{};
  p.columns = out.size(1) * (activation == "geglu" ? 2 : 1);
  set_images(p, x, x2, window);
  heatsink::set_product(p, x, weight, bias, sample_add, activation);
  set_result(p, residual, out);
  heatsink::run_in(p, scratch);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("conv2d_packed", HEATSINK_RECORDABLE(conv2d_packed));
}
