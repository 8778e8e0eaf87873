// Between dense maps and the rows of visible patches: copies there and back, and neighbour tables, which name for every row and
// tap of a window the row on the other side of the convolution.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "bounds.h"

namespace sparkme {
namespace {

// What a window reaches along one axis: for every pixel of a patch and every tap, (side, taps), the patch, counted from the
// first that is reached at all, and the pixel there. Taps that read nothing name the patch behind the last.
struct Reach {
  int64_t first = 0, patches = 0;
  std::vector<int64_t> patch, pixel;

  // `reach` is that of geometry.h, `pixels` the input's.
  Reach(int64_t side, int64_t taps, int64_t reach, int64_t stride, int64_t dilation, int64_t pixels, bool transposed) {
    const int64_t width = transposed ? pixels / stride : pixels;  // of a patch on the other side of the convolution
    std::vector<int64_t> places;
    for (int64_t at = 0; at < side; ++at)
      for (int64_t tap = 0; tap < taps; ++tap)
        places.push_back(transposed ? at - tap * dilation + reach : at * stride + tap * dilation - reach);
    const auto floor_of = [](int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); };
    const int64_t step = transposed ? stride : 1;
    first = floor_of(*std::min_element(places.begin(), places.end()), step * width);
    patches = floor_of(*std::max_element(places.begin(), places.end()), step * width) - first + 1;
    for (const int64_t place : places) {
      const bool none = place % step != 0;
      const int64_t there = floor_of(place, step), which = floor_of(there, width);
      patch.push_back(none ? patches : which - first);
      pixel.push_back(none ? 0 : there - which * width);
    }
  }
};

Tensor neighbour_table(const Tensor &slots, const Tensor &patches, int64_t pixels, Sizes kernel_size, int64_t stride,
                       int64_t dilation, bool transposed) {
  const Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Sites sites = checked_sites(slots_, patches_);
  const Window window = window_of(kernel_size, stride, dilation);
  TORCH_CHECK_VALUE(stride > 0 && pixels % stride == 0, "stride ", stride, " does not divide the patch of pixels=", pixels);
  const int64_t side = transposed ? pixels : pixels / stride, width = transposed ? pixels / stride : pixels;
  const int64_t height = window.height, taps = window.taps(), area = side * side;
  const Reach down(side, window.height, window.reach_y(), stride, dilation, pixels, transposed);
  const Reach across(side, window.width, window.reach_x(), stride, dilation, pixels, transposed);
  Tensor table = at::empty({patches_.size(0) * area, taps}, slots_.options());
  auto *out = table.mutable_data_ptr<int32_t>();
  at::parallel_for(0, patches_.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> around((down.patches + 1) * (across.patches + 1), -1);  // the patches that are reached, or -1
    for (int64_t patch = begin; patch < end; ++patch) {
      const int64_t cells = int64_t{sites.f_h} * sites.f_w, cell = sites.patches[patch] % cells;
      const int32_t *slot = sites.slots + sites.patches[patch] / cells * cells;
      for (int64_t i = 0; i < down.patches; ++i) {
        for (int64_t j = 0; j < across.patches; ++j) {
          const int64_t y = cell / sites.f_w + down.first + i, x = cell % sites.f_w + across.first + j;
          const bool inside = y >= 0 && x >= 0 && y < sites.f_h && x < sites.f_w;
          around[i * (across.patches + 1) + j] = inside ? slot[y * sites.f_w + x] : -1;
        }
      }
      for (int64_t y = 0; y < side; ++y) {
        for (int64_t x = 0; x < side; ++x) {
          int32_t *row = out + (patch * area + y * side + x) * taps;
          for (int64_t tap_x = 0; tap_x < window.width; ++tap_x) {
            const int64_t at_x = x * window.width + tap_x;
            const int64_t *column = around.data() + across.patch[at_x];
            for (int64_t tap_y = 0; tap_y < height; ++tap_y) {
              const int64_t at_y = y * height + tap_y, found = column[down.patch[at_y] * (across.patches + 1)];
              const int64_t number = (found * width + down.pixel[at_y]) * width + across.pixel[at_x];
              *row++ = static_cast<int32_t>(found < 0 ? -1 : number);
            }
          }
        }
      }
    }
  });
  return table;
}

Tensor voxelise(const Tensor &dense, const Tensor &slots, const Tensor &patches, int64_t pixels) {
  const Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Sites sites = checked_sites(slots_, patches_);
  TORCH_CHECK_VALUE(dense.dim() == 4 && dense.size(0) == slots_.size(0) && dense.size(2) == sites.f_h * pixels &&
                        dense.size(3) == sites.f_w * pixels,
                    "dense ", dense.sizes(), " does not fit slots ", slots_.sizes(), " of pixels=", pixels);
  const int64_t channels = dense.size(1), cells = int64_t{sites.f_h} * sites.f_w;
  const auto strides = dense.strides();
  Tensor rows = at::empty({patches_.size(0) * pixels * pixels, channels}, dense.options());
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

Tensor densify(const Tensor &rows, const Tensor &slots, const Tensor &patches, int64_t pixels, const Optional &fill) {
  const Tensor rows_ = rows.contiguous(), slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Sites sites = checked_sites(slots_, patches_);
  check_rows("rows", rows_, patches_.size(0) * pixels * pixels);
  const int64_t channels = rows_.size(1), batch = slots_.size(0);
  Tensor dense = at::empty({batch, sites.f_h * pixels, sites.f_w * pixels, channels}, rows_.options());
  Tensor background;
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
  m.impl("neighbour_table", neighbour_table);
  m.impl("voxelise", voxelise);
  m.impl("densify", densify);
}

}  // namespace sparkme
