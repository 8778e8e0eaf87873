// Dense maps to rows and back, patch by patch.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "bounds.h"

namespace sparkme {
namespace {

at::Tensor voxelise(const at::Tensor &dense, const at::Tensor &slots, const at::Tensor &patches, int64_t pixels) {
  const at::Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Sites sites = checked_sites(slots_, patches_);
  TORCH_CHECK_VALUE(dense.dim() == 4 && dense.size(0) == slots_.size(0) && dense.size(2) == sites.f_h * pixels &&
                        dense.size(3) == sites.f_w * pixels,
                    "dense ", dense.sizes(), " does not fit slots ", slots_.sizes(), " of pixels=", pixels);
  const int64_t channels = dense.size(1), cells = int64_t{sites.f_h} * sites.f_w;
  const auto strides = dense.strides();
  at::Tensor rows = at::empty({patches_.size(0) * pixels * pixels, channels}, dense.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, dense.scalar_type(), "voxelise", [&] {
    const auto *source = dense.const_data_ptr<scalar_t>();
    auto *target = rows.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, patches_.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t patch = begin; patch < end; ++patch) {
        const int64_t place = sites.patches[patch], sample = place / cells, cell = place % cells;
        const scalar_t *corner =
            source + sample * strides[0] + cell / sites.f_w * pixels * strides[2] + cell % sites.f_w * pixels * strides[3];
        scalar_t *row = target + patch * pixels * pixels * channels;
        if (strides[1] == 1 && strides[3] == channels) {  // channels_last: a patch's line is one piece of memory
          for (int64_t y = 0; y < pixels; ++y)
            std::copy_n(corner + y * strides[2], pixels * channels, row + y * pixels * channels);
          continue;
        }
        for (int64_t y = 0; y < pixels; ++y)
          for (int64_t c = 0; c < channels; ++c)
            for (int64_t x = 0; x < pixels; ++x)
              row[(y * pixels + x) * channels + c] = corner[c * strides[1] + y * strides[2] + x * strides[3]];
      }
    });
  });
  return rows;
}

at::Tensor densify(const at::Tensor &rows, const at::Tensor &slots, const at::Tensor &patches, int64_t pixels,
                   const std::optional<at::Tensor> &fill) {
  const at::Tensor rows_ = rows.contiguous(), slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Sites sites = checked_sites(slots_, patches_);
  check_rows("rows", rows_, patches_.size(0) * pixels * pixels);
  const int64_t channels = rows_.size(1), batch = slots_.size(0);
  at::Tensor dense = at::empty({batch, sites.f_h * pixels, sites.f_w * pixels, channels}, rows_.options());
  at::Tensor background;
  if (fill) {
    TORCH_CHECK_VALUE(fill->dim() == 1 && fill->size(0) == channels, "fill must be (", channels, ",)");
    background = fill->to(rows_.scalar_type()).contiguous();
  }
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows_.scalar_type(), "densify", [&] {
    const auto *source = rows_.const_data_ptr<scalar_t>();
    const scalar_t *colour = fill ? background.const_data_ptr<scalar_t>() : nullptr;
    auto *target = dense.mutable_data_ptr<scalar_t>();
    const int64_t line = pixels * channels;  // of one patch
    at::parallel_for(0, batch * sites.f_h * pixels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {  // one line of pixels across the image
        const int64_t y = i % pixels;
        for (int32_t cell_x = 0; cell_x < sites.f_w; ++cell_x) {
          const int64_t slot = sites.slots[i / pixels * sites.f_w + cell_x];
          scalar_t *out = target + (i * sites.f_w + cell_x) * line;
          if (slot >= 0) {
            std::copy_n(source + (slot * pixels + y) * line, line, out);
          } else if (!colour) {
            std::fill_n(out, line, scalar_t(0));
          } else {
            for (int64_t x = 0; x < pixels; ++x) std::copy_n(colour, channels, out + x * channels);
          }
        }
      }
    });
  });
  return dense.permute({0, 3, 1, 2});
}

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, CPU, m) {
  m.impl("voxelise", voxelise);
  m.impl("densify", densify);
}

}  // namespace sparkme
