// The left side of a product, copied so that kernels find it in rows: what a convolution's kernel
// sees of its images.

#include <algorithm>
#include <cstring>

#include "product.h"

namespace heatsink {
namespace {

// Walks along one row of A.
struct Walk {
  const Product& p;
  int64_t bytes, channels;
  bool dense;  // neighbouring pixels' channels follow each other

  explicit Walk(const Product& product)
      : p(product),
        bytes(product.bfloat16 ? 2 : 4),
        channels(product.images[0].channels + product.images[1].channels),
        dense(product.images[1].channels == 0 && product.shift == 0 &&
              product.images[0].pixel == product.images[0].channels * bytes) {}

  // Elements from place k of the output pixel (y, x) that can be copied at once, `count` at most,
  // and where they lie; null for zeros. `y` and `x` are the kernel's corner in the image.
  int64_t stretch(int64_t sample, int64_t y, int64_t x, int64_t k, int64_t count,
                  const char** from) const {
    const int64_t tap = k / channels;
    int64_t channel = k - tap * channels;
    const int64_t kx = tap % p.kernel_width;
    const int64_t iy = y + tap / p.kernel_width;
    const int64_t ix = x + kx;
    *from = nullptr;
    if (iy < 0 || iy >= p.height || ix < 0 || ix >= p.width) {
      return std::min(count, channels - channel);
    }
    const bool second = channel >= p.images[0].channels;
    const Image& image = p.images[second ? 1 : 0];
    channel -= second ? p.images[0].channels : 0;
    *from = image.data + sample * image.sample + (iy >> p.shift) * image.row +
            (ix >> p.shift) * image.pixel + channel * bytes;
    const int64_t taps = dense ? std::min(p.kernel_width - kx, p.width - ix) : 1;
    return std::min(count, taps * image.channels - channel);
  }
};

}  // namespace

void gather(const Product& p, int64_t row, int64_t rows, int64_t k, int64_t count, int64_t padded,
            char* to) {
  const Walk walk(p);
  const int64_t pitch = pitch_of(p);
  const int64_t bytes = walk.bytes;
  const int64_t pixels = p.out_height * p.out_width;
  int64_t sample = row / pixels;
  int64_t y = (row - sample * pixels) / p.out_width;
  int64_t x = row - sample * pixels - y * p.out_width;
  for (int64_t r = 0; r < rows; ++r, to += pitch) {
    for (int64_t done = 0; done < count;) {
      const char* from;
      const int64_t some = walk.stretch(sample, y * p.stride - p.padding,
                                        x * p.stride - p.padding, k + done, count - done, &from);
      const auto size = static_cast<size_t>(some * bytes);
      if (from == nullptr) {
        std::memset(to + done * bytes, 0, size);
      } else {
        std::memcpy(to + done * bytes, from, size);
      }
      done += some;
    }
    std::memset(to + count * bytes, 0, static_cast<size_t>((padded - count) * bytes));
    if (++x == p.out_width) {
      x = 0;
      if (++y == p.out_height) {
        y = 0;
        ++sample;
      }
    }
  }
}

}  // namespace heatsink
