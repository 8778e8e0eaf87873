// The gradient of the depthwise convolution.
#include "cpu/depthwise.cpp"

#include "autograd.h"

namespace sparkme {
namespace {

struct DepthwiseConv : Function<DepthwiseConv> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &kernel, const Optional &bias, const Tensor &slots,
                        const Tensor &patches, int64_t pixels, Sizes kernel_size, int64_t stride, int64_t dilation) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({rows, kernel, slots, patches});
    ctx->saved_data["bias"] = differs(bias);
    ctx->saved_data["geometry"] = std::vector<int64_t>{pixels, kernel_size[0], kernel_size[1], stride, dilation};
    return SPARKME_CALL(depthwise_conv, rows, kernel, bias, slots, patches, pixels, kernel_size, stride, dilation);
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto geometry = ctx->saved_data["geometry"].toIntVector();
    const Sizes size(geometry.data() + 1, 2);
    variable_list out(9);
    if (saved[0].requires_grad())
      out[0] = SPARKME_CALL(depthwise_conv_grad_rows, grads[0], saved[1], saved[2], saved[3], geometry[0], size, geometry[3],
                            geometry[4]);
    if (saved[1].requires_grad())
      out[1] = SPARKME_CALL(depthwise_conv_grad_kernel, saved[0], grads[0], saved[2], saved[3], geometry[0], size, geometry[3],
                            geometry[4]);
    if (ctx->saved_data["bias"].toBool()) out[2] = grads[0].sum(0);
    return out;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, Autograd, m) {
  m.impl("depthwise_conv", differentiable<DepthwiseConv>());
  m.impl("depthwise_conv_grad_rows", no_gradient());
  m.impl("depthwise_conv_grad_kernel", no_gradient());
}

}  // namespace sparkme
