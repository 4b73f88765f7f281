// The left side of a product, copied so that kernels find it in rows: what a convolution's kernel
// sees of its images.
//
// No standard header here, as in product_kernel.h.
#pragma once

#include "product.h"
#include "vector_math.h"

namespace heatsink {
namespace {

HEATSINK_INLINE void copy_bytes(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kWide = sizeof(Vector);
  for (; bytes >= kWide; bytes -= kWide, to += kWide, from += kWide) {
    Vector x;
    std::memcpy(&x, from, kWide);
    std::memcpy(to, &x, kWide);
  }
  if (bytes > 0) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
}

HEATSINK_INLINE void clear_bytes(char* to, int64_t bytes) {
  constexpr int64_t kWide = sizeof(Vector);
  const Vector zeros = {};
  for (; bytes >= kWide; bytes -= kWide, to += kWide) {
    std::memcpy(to, &zeros, kWide);
  }
  if (bytes > 0) {
    std::memset(to, 0, static_cast<size_t>(bytes));
  }
}

// Some channels of an image that the kernel sees at its place (y, x).
struct Stretch {
  const Image* image;
  int64_t y, x;
  int64_t skipped, bytes;  // of the image's channels
};

// What is at place k of a row, `count` elements at the most.
inline Stretch stretch_at(const Product& p, int64_t bytes, int64_t k, int64_t count) {
  const int64_t first = p.images[0].channels;
  const int64_t channels = first + p.images[1].channels;
  const int64_t tap = k / channels;
  const int64_t channel = k - tap * channels;
  const bool second = channel >= first;
  const int64_t left = (second ? channels : first) - channel;
  return {&p.images[second ? 1 : 0], tap / p.kernel_width, tap % p.kernel_width,
          (second ? channel - first : channel) * bytes, (left < count ? left : count) * bytes};
}

// Copies a stretch of rows row..row+rows-1, zeros where the kernel leaves the image.
HEATSINK_INLINE void gather_stretch(const Product& p, const Stretch& s, int64_t row, int64_t rows,
                                    char* to, int64_t pitch) {
  const int64_t pixels = p.out_height * p.out_width;
  int64_t sample = row / pixels;
  int64_t y = (row - sample * pixels) / p.out_width;
  int64_t x = row - sample * pixels - y * p.out_width;
  const int64_t width = p.width, shift = p.shift, stride = p.stride;
  const int64_t pixel = s.image->pixel, bytes = s.bytes;
  while (rows > 0) {
    const int64_t some = p.out_width - x < rows ? p.out_width - x : rows;
    const int64_t iy = y * stride - p.padding + s.y;
    const bool inside = iy >= 0 && iy < p.height;
    const char* line =
        s.image->data + sample * s.image->sample + (iy >> shift) * s.image->row + s.skipped;
    int64_t ix = x * stride - p.padding + s.x;
    for (int64_t r = 0; r < some; ++r, ix += stride, to += pitch) {
      if (inside && ix >= 0 && ix < width) {
        copy_bytes(to, line + (ix >> shift) * pixel, bytes);
      } else {
        clear_bytes(to, bytes);
      }
    }
    rows -= some;
    x = 0;
    if (++y == p.out_height) {
      y = 0;
      ++sample;
    }
  }
}

// Copies elements k..k+count-1 of rows row..row+rows-1 of A, and zeros up to `padded` elements.
inline void gather(const Product& p, int64_t row, int64_t rows, int64_t k, int64_t count,
                   int64_t padded, char* to) {
  const int64_t pitch = pitch_of(p);
  const int64_t bytes = p.bfloat16 ? 2 : 4;
  for (int64_t done = 0; done < count;) {
    const Stretch s = stretch_at(p, bytes, k + done, count - done);
    gather_stretch(p, s, row, rows, to + done * bytes, pitch);
    done += s.bytes / bytes;
  }
  for (int64_t r = 0; r < rows && count < padded; ++r) {
    clear_bytes(to + r * pitch + count * bytes, (padded - count) * bytes);
  }
}

// Elements k..k+count-1 of rows row..row+rows-1 of A if they lie evenly in an image, `*pitch` bytes
// apart; else null. Neighbouring pixels' channels may follow each other.
inline const char* rows_in_place(const Product& p, int64_t row, int64_t rows, int64_t k,
                                 int64_t count, int64_t* pitch) {
  const int64_t bytes = p.bfloat16 ? 2 : 4;
  *pitch = p.images[0].pixel;
  if (p.direct) {
    return p.images[0].data + row * *pitch + k * bytes;
  }
  const int64_t y = row / p.out_width;
  const int64_t x = row - y * p.out_width;
  if (p.stride != 1 || p.shift != 0 || x + rows > p.out_width) {
    return nullptr;
  }
  const Stretch s = stretch_at(p, bytes, k, count);
  const Image& image = *s.image;
  const int64_t missing = count * bytes - s.bytes;
  const int64_t after = missing == 0 ? 0 : ceil_div(missing, image.pixel);  // pixels to the right
  const bool dense = image.pixel == image.channels * bytes && p.images[1].channels == 0;
  const int64_t sample = y / p.out_height;
  const int64_t iy = y - sample * p.out_height - p.padding + s.y;
  const int64_t ix = x - p.padding + s.x;
  if ((after > 0 && (!dense || s.x + after >= p.kernel_width)) || iy < 0 || iy >= p.height ||
      ix < 0 || ix + rows + after > p.width) {
    return nullptr;
  }
  *pitch = image.pixel;
  return image.data + sample * image.sample + iy * image.row + ix * image.pixel + s.skipped;
}

}  // namespace
}  // namespace heatsink
