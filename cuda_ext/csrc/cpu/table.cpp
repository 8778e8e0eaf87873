// Neighbour tables: for every row and tap of a window, the row on the other side of the convolution.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bounds.h"

namespace sparkme {
namespace {

at::Tensor neighbour_table(const at::Tensor &slots, const at::Tensor &patches, int64_t pixels, at::IntArrayRef kernel_size,
                           int64_t stride, int64_t dilation, bool transposed) {
  const at::Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Sites sites = checked_sites(slots_, patches_);
  const Window window = window_of(kernel_size, stride, dilation);
  TORCH_CHECK_VALUE(stride > 0 && pixels % stride == 0, "stride ", stride, " does not divide the patch of pixels=", pixels);
  const auto side = static_cast<int32_t>(transposed ? pixels : pixels / stride);
  const int64_t taps = window.taps(), area = int64_t{side} * side;
  at::Tensor table = at::empty({patches_.size(0) * area, taps}, slots_.options());
  auto *out = table.mutable_data_ptr<int32_t>();
  at::parallel_for(0, patches_.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t patch = begin; patch < end; ++patch) {
      for (int64_t pixel = 0; pixel < area; ++pixel) {
        const auto y = static_cast<int32_t>(pixel / side), x = static_cast<int32_t>(pixel % side);
        int32_t *row = out + (patch * area + pixel) * taps;
        for (int32_t tap = 0; tap < taps; ++tap) {
          row[tap] = static_cast<int32_t>(transposed ? output_row(sites, window, patch, y, x, tap, pixels)
                                                     : input_row(sites, window, patch, y, x, tap, pixels));
        }
      }
    }
  });
  return table;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, CPU, m) { m.impl("neighbour_table", neighbour_table); }

}  // namespace sparkme
