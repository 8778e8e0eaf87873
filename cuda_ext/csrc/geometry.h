// Where the neighbours of a row are. The same functions run in the CPU's loops and in the CUDA kernels.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SPARKME_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPARKME_HOST_DEVICE inline
#endif

namespace sparkme {

// The visible patches of a batch; see sparkme/ops/__init__.py.
struct Sites {
  const int32_t *slots;    // (B, f_h, f_w): number among the visible patches, or -1
  const int32_t *patches;  // (P): place in the flattened slots
  int32_t f_h, f_w;
};

// A convolution's window. An odd side is centred on the output pixel, an even one starts at it.
struct Window {
  int32_t height, width, stride, dilation;

  SPARKME_HOST_DEVICE int32_t taps() const { return height * width; }
  SPARKME_HOST_DEVICE int32_t reach_y() const { return height % 2 ? height / 2 * dilation : 0; }
  SPARKME_HOST_DEVICE int32_t reach_x() const { return width % 2 ? width / 2 * dilation : 0; }
  // From where an output pixel lies in the input to what it reads through a tap, in pixels.
  SPARKME_HOST_DEVICE int32_t down(int32_t tap) const { return tap % height * dilation - reach_y(); }
  SPARKME_HOST_DEVICE int32_t across(int32_t tap) const { return tap / height * dilation - reach_x(); }
};

// The row of the pixel (y, x), counted from the corner of visible patch `patch` and perhaps outside of it, at `pixels` along a
// patch; -1 where it is hidden or outside of the image.
SPARKME_HOST_DEVICE int64_t row_at(const Sites &sites, int32_t patch, int32_t y, int32_t x, int32_t pixels) {
  if (y >= 0 && x >= 0 && y < pixels && x < pixels) return (static_cast<int64_t>(patch) * pixels + y) * pixels + x;
  const int32_t cells = sites.f_h * sites.f_w;
  const int32_t place = sites.patches[patch];
  const int32_t sample = place / cells, cell = place % cells;
  const int32_t image_y = cell / sites.f_w * pixels + y, image_x = cell % sites.f_w * pixels + x;
  if (image_y < 0 || image_x < 0 || image_y >= sites.f_h * pixels || image_x >= sites.f_w * pixels) return -1;
  const int32_t slot = sites.slots[sample * cells + image_y / pixels * sites.f_w + image_x / pixels];
  if (slot < 0) return -1;
  return (static_cast<int64_t>(slot) * pixels + image_y % pixels) * pixels + image_x % pixels;
}

// The input row that output pixel (y, x) of `patch` reads through a tap, or -1. `pixels` is the input's.
SPARKME_HOST_DEVICE int64_t input_row(const Sites &sites, const Window &window, int32_t patch, int32_t y, int32_t x,
                                      int32_t tap, int32_t pixels) {
  return row_at(sites, patch, y * window.stride + window.down(tap), x * window.stride + window.across(tap), pixels);
}

// The output row that lies at (y, x) of the input, counted from the corner of `patch`, or -1. `pixels` is the input's.
SPARKME_HOST_DEVICE int64_t output_row(const Sites &sites, const Window &window, int32_t patch, int32_t y, int32_t x,
                                       int32_t pixels) {
  if (y % window.stride || x % window.stride) return -1;  // also right for negative numbers: only zero matters
  return row_at(sites, patch, y / window.stride, x / window.stride, pixels / window.stride);
}

// The output row that reads input pixel (y, x) of `patch` through a tap, or -1. `pixels` is the input's.
SPARKME_HOST_DEVICE int64_t output_row(const Sites &sites, const Window &window, int32_t patch, int32_t y, int32_t x,
                                       int32_t tap, int32_t pixels) {
  return output_row(sites, window, patch, y - window.down(tap), x - window.across(tap), pixels);
}

}  // namespace sparkme
