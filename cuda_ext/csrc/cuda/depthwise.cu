// Depthwise convolution of patch-major rows.
//
// Three ways to compute one thing, chosen by the size of a patch:
//
//   8 and 4 pixels   A block copies a tile of 8x8 or 4x4 pixels and its halo into shared memory, 128 bytes of channels wide. A
//                    lane keeps one word of channels and sums two lines of outputs in registers (depthwise_tiles.cu).
//   2 pixels         Nearly all that a window reads lies in other patches, of which most are hidden. A warp takes a patch of
//                    its own, with all weights in registers, and steps over hidden neighbours as a whole
//                    (depthwise_patches.cu).
//   anything else    A block finds the neighbours of a few rows, then sums over those that are visible. Any patch, window,
//                    stride and number of channels; with one pixel per patch it is also the fastest (depthwise_rows.cu).
//
// All sums are in float32 (float64 for float64). The weights' gradient is summed in an order that only the sizes and the device
// decide: every block sums its share, a second kernel sums the blocks.
#include "depthwise.h"
#include "tensors.h"

namespace sparkme::cuda {
namespace {

// The side of the tiles that patches are cut into, or 0 where only the kernels that go row by row can do it.
int32_t tile_of(const Geometry &geometry) {
  const Window &window = geometry.window;
  const bool known = window.height == 3 || window.height == 5 || window.height == 7;
  if (!known || window.width != window.height || window.stride != 1 || window.dilation != 1) return 0;
  return geometry.pixels % 8 == 0 ? 8 : geometry.pixels % 4 == 0 ? 4 : geometry.pixels % 2 == 0 ? 2 : 0;
}

Tensor convolve_depthwise(const Tensor &rows, const Tensor &kernel, const Optional &bias, const Tensor &slots,
                          const Tensor &patches, int64_t pixels, Sizes kernel_size, int64_t stride, int64_t dilation,
                          bool transposed) {
  const auto guard = on_device_of(rows, kernel, slots, patches);
  check_types(rows, kernel);
  const Tensor rows_ = rows.contiguous(), kernel_ = kernel.contiguous();
  const Tensor bias_ = bias ? bias->contiguous() : Tensor();
  if (bias) {
    check_types(rows, *bias);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == rows.size(1), "bias must be (", rows.size(1), ",)");
    TORCH_CHECK_VALUE(bias->device() == rows.device(), "bias must be on ", rows.device());
  }
  const Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, kernel_size, stride, dilation);
  const Window &window = geometry.window;
  TORCH_CHECK_VALUE(window.height % 2 && window.width % 2, "kernel_size must be odd");
  const int64_t side = pixels / stride, inputs = geometry.patches * pixels * pixels, outputs = geometry.patches * side * side;
  check_rows(transposed ? "grad" : "rows", rows_, transposed ? outputs : inputs);
  check_rows("kernel", kernel_, window.taps());
  TORCH_CHECK_VALUE(kernel_.size(1) == rows_.size(1), "kernel must have ", rows_.size(1), " channels, got ", kernel_.size(1));
  Tensor out = at::empty({transposed ? inputs : outputs, rows_.size(1)}, rows_.options());
  with_type(rows_.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (out.numel() == 0) return;
    const Depthwise<T> call = {out.mutable_data_ptr<T>(),
                               rows_.const_data_ptr<T>(),
                               kernel_.const_data_ptr<T>(),
                               data_or_null<T>(bias_),
                               geometry,
                               channels_of(rows_),
                               transposed,
                               current_stream()};
    const bool wide = fits_widest<T>(call.channels, call.rows, call.kernel, call.bias, call.out);
    if constexpr (!std::is_same_v<T, double>) {
      const int32_t tile = wide ? tile_of(geometry) : 0;
      if (tile >= 4) return convolve_tiles(call, tile);
      if (tile == 2) return convolve_patches(call);
    }
    convolve_rows(call, wide);
  });
  return out;
}

Tensor depthwise_conv(const Tensor &rows, const Tensor &kernel, const Optional &bias, const Tensor &slots,
                      const Tensor &patches, int64_t pixels, Sizes kernel_size, int64_t stride, int64_t dilation) {
  return convolve_depthwise(rows, kernel, bias, slots, patches, pixels, kernel_size, stride, dilation, false);
}

Tensor depthwise_conv_grad_rows(const Tensor &grad, const Tensor &kernel, const Tensor &slots, const Tensor &patches,
                                int64_t pixels, Sizes kernel_size, int64_t stride, int64_t dilation) {
  return convolve_depthwise(grad, kernel, std::nullopt, slots, patches, pixels, kernel_size, stride, dilation, true);
}

Tensor depthwise_conv_grad_kernel(const Tensor &rows, const Tensor &grad, const Tensor &slots, const Tensor &patches,
                                  int64_t pixels, Sizes kernel_size, int64_t stride, int64_t dilation) {
  const auto guard = on_device_of(rows, grad, slots, patches);
  check_types(rows, grad);
  const Tensor rows_ = rows.contiguous(), grad_ = grad.contiguous();
  const Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, kernel_size, stride, dilation);
  const int64_t side = pixels / stride;
  TORCH_CHECK_VALUE(geometry.window.height % 2 && geometry.window.width % 2, "kernel_size must be odd");
  check_rows("rows", rows_, geometry.patches * pixels * pixels);
  check_rows("grad", grad_, geometry.patches * side * side);
  TORCH_CHECK_VALUE(grad_.size(1) == rows_.size(1), "grad must have ", rows_.size(1), " channels, got ", grad_.size(1));
  Tensor out = at::empty({geometry.window.taps(), rows_.size(1)}, rows_.options());
  // Given back when the operator returns, which is sound: the allocator hands it on in the order of the stream.
  Tensor memory;
  const auto allocate = [&](int64_t bytes) {
    memory = at::empty({bytes}, rows_.options().dtype(at::kByte));
    return memory.mutable_data_ptr();
  };
  with_type(rows_.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (out.numel() == 0) return;
    const DepthwiseGradKernel<T> call = {
        out.mutable_data_ptr<T>(), rows_.const_data_ptr<T>(), grad_.const_data_ptr<T>(), geometry, channels_of(rows_), allocate,
        current_stream()};
    const bool wide = fits_widest<T>(call.channels, call.rows, call.grad);
    if constexpr (!std::is_same_v<T, double>) {
      const int32_t tile = wide ? tile_of(geometry) : 0;
      if (tile >= 4) return correlate_tiles(call, tile);
      if (tile == 2) return correlate_patches(call);
    }
    correlate_rows(call, wide);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(SPARKME_LIBRARY, SPARKME_KEY, m) {
  m.impl("depthwise_conv", depthwise_conv);
  m.impl("depthwise_conv_grad_rows", depthwise_conv_grad_rows);
  m.impl("depthwise_conv_grad_kernel", depthwise_conv_grad_kernel);
}

}  // namespace sparkme::cuda
