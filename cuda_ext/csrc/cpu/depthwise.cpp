// Depthwise convolution: patch by patch, in parallel, straight from the rows of the patch and its halo.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "bounds.h"
#include "kernels.h"

namespace sparkme {
namespace {

// Finds the rows of a patch and its halo.
template <typename T>
class Tiles {
 public:
  // `pixels`: along a patch of the convolution's input. `spread`: the rows lie at every spread-th pixel only, the rest is zero;
  // so the gradient of a strided convolution is read.
  Tiles(const Sites &sites, const Window &window, int32_t pixels, int32_t spread, const Tensor &rows)
      : sites_(sites),
        window_(window),
        pixels_(pixels),
        spread_(spread),
        rows_(rows.const_data_ptr<T>()),
        channels_(rows.size(1)),
        zero_(channels_, T(0)) {
    side_ = pixels / window.stride;
    tile_rows_ = (side_ - 1) * window.stride + (window.height - 1) * window.dilation + 1;
    tile_columns_ = (side_ - 1) * window.stride + (window.width - 1) * window.dilation + 1;
  }

  int32_t side() const { return side_; }

  DepthwisePatch<T> find(int64_t patch, std::vector<const T *> &tile) const {
    tile.resize(tile_rows_ * tile_columns_);
    for (int32_t row = 0; row < tile_rows_; ++row) {
      const int32_t y = row - window_.reach_y();
      for (int32_t column = 0; column < tile_columns_; ++column) {
        const int32_t x = column - window_.reach_x();
        const bool between = y % spread_ || x % spread_;
        const int64_t source =
            between ? -1 : row_at(sites_, static_cast<int32_t>(patch), y / spread_, x / spread_, pixels_ / spread_);
        tile[row * tile_columns_ + column] = source < 0 ? zero_.data() : rows_ + source * channels_;
      }
    }
    return {tile.data(),      tile_columns_,  zero_.data(),  side_,     window_.stride,
            window_.dilation, window_.height, window_.width, channels_, spread_ > 1};
  }

 private:
  Sites sites_;
  Window window_;
  int32_t pixels_, spread_, side_, tile_rows_, tile_columns_;
  const T *rows_;
  int64_t channels_;
  std::vector<T> zero_;
};

Tensor convolve_patches(const Tensor &rows, const Tensor &kernel, const Optional &bias, const Sites &sites, int64_t num_patches,
                        const Window &window, int64_t pixels, int64_t spread) {
  const Tensor kernel_ = kernel.to(sum_type(kernel)).contiguous();
  const Tensor bias_ = bias ? bias->to(sum_type(*bias)).contiguous() : Tensor();
  TORCH_CHECK_VALUE(window.height % 2 && window.width % 2, "kernel_size must be odd");
  TORCH_CHECK_VALUE(kernel_.dim() == 2 && kernel_.size(0) == window.taps() && kernel_.size(1) == rows.size(1),
                    "kernel must be (", window.taps(), ", ", rows.size(1), ")");
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == rows.size(1)), "bias must be (", rows.size(1), ",)");
  const int64_t area = (pixels / window.stride) * (pixels / window.stride), channels = rows.size(1);
  Tensor out = at::empty({num_patches * area, channels}, rows.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows.scalar_type(), "depthwise_conv", [&] {
    const Tiles<scalar_t> tiles(sites, window, pixels, spread, rows);
    at::parallel_for(0, num_patches, 1, [&](int64_t begin, int64_t end) {
      std::vector<const scalar_t *> tile;
      for (int64_t patch = begin; patch < end; ++patch) {
        kernels_of<scalar_t>().convolve(tiles.find(patch, tile), kernel_.const_data_ptr<Sum<scalar_t>>(),
                                        bias ? bias_.const_data_ptr<Sum<scalar_t>>() : nullptr,
                                        out.mutable_data_ptr<scalar_t>() + patch * area * channels);
      }
    });
  });
  return out;
}

Tensor depthwise_conv(const Tensor &rows, const Tensor &kernel, const Optional &bias, const Tensor &slots,
                      const Tensor &patches, int64_t pixels, Sizes kernel_size, int64_t stride, int64_t dilation) {
  const Tensor rows_ = rows.contiguous(), slots_ = slots.contiguous(), patches_ = patches.contiguous();
  check_rows("rows", rows_, patches_.size(0) * pixels * pixels);
  return convolve_patches(rows_, kernel, bias, checked_sites(slots_, patches_), patches_.size(0),
                          window_of(kernel_size, stride, dilation), pixels, 1);
}

// The convolution of the gradient, spread out to the input's pixels, with the kernel turned round.
Tensor depthwise_conv_grad_rows(const Tensor &grad, const Tensor &kernel, const Tensor &slots, const Tensor &patches,
                                int64_t pixels, Sizes kernel_size, int64_t stride, int64_t dilation) {
  const Tensor grad_ = grad.contiguous(), slots_ = slots.contiguous(), patches_ = patches.contiguous();
  check_rows("grad", grad_, patches_.size(0) * (pixels / stride) * (pixels / stride));
  return convolve_patches(grad_, kernel.flip(0), std::nullopt, checked_sites(slots_, patches_), patches_.size(0),
                          window_of(kernel_size, 1, dilation), pixels, stride);
}

Tensor depthwise_conv_grad_kernel(const Tensor &rows, const Tensor &grad, const Tensor &slots, const Tensor &patches,
                                  int64_t pixels, Sizes kernel_size, int64_t stride, int64_t dilation) {
  const Tensor rows_ = rows.contiguous(), grad_ = grad.contiguous(), slots_ = slots.contiguous(),
               patches_ = patches.contiguous();
  const Sites sites = checked_sites(slots_, patches_);
  const Window window = window_of(kernel_size, stride, dilation);
  const int64_t num_patches = patches_.size(0), channels = rows_.size(1), area = (pixels / stride) * (pixels / stride);
  check_rows("rows", rows_, num_patches * pixels * pixels);
  check_rows("grad", grad_, num_patches * area);
  TORCH_CHECK_VALUE(grad_.size(1) == channels, "grad must have ", channels, " channels");
  // Partial sums of so many rows as a kernel's numbers are worth, whatever the number of threads: the result does not depend on
  // it.
  const int64_t num_parts = std::min(std::max<int64_t>(1, num_patches), std::clamp<int64_t>(num_patches * area / 128, 2, 16));
  Tensor parts = at::zeros({num_parts, window.taps(), channels}, rows_.options().dtype(sum_type(rows_)));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows_.scalar_type(), "depthwise_conv_grad_kernel", [&] {
    const Tiles<scalar_t> tiles(sites, window, pixels, 1, rows_);
    at::parallel_for(0, num_parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = num_patches * part / num_parts, count = num_patches * (part + 1) / num_parts - first;
        if (!count) continue;
        std::vector<std::vector<const scalar_t *>> pointers(count);
        std::vector<DepthwisePatch<scalar_t>> found;
        std::vector<const scalar_t *> grads;
        for (int64_t i = 0; i < count; ++i) {
          found.push_back(tiles.find(first + i, pointers[i]));
          grads.push_back(grad_.const_data_ptr<scalar_t>() + (first + i) * area * channels);
        }
        kernels_of<scalar_t>().correlate(found.data(), grads.data(), count,
                                         parts.mutable_data_ptr<Sum<scalar_t>>() + part * window.taps() * channels);
      }
    });
  });
  return parts.sum(0).to(rows_.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, CPU, m) {
  m.impl("depthwise_conv", depthwise_conv);
  m.impl("depthwise_conv_grad_rows", depthwise_conv_grad_rows);
  m.impl("depthwise_conv_grad_kernel", depthwise_conv_grad_kernel);
}

}  // namespace sparkme
