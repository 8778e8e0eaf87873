// The gradient of the sparse convolution.
#include "cpu/convolution.cpp"

#include "autograd.h"

namespace sparkme {
namespace {

struct SparseConv : Function<SparseConv> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &kernel, const Tensor &table, const Optional &inverse,
                        int64_t groups) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({rows, kernel, table, kept(inverse)});
    ctx->saved_data["groups"] = groups;
    return SPARKME_CALL(sparse_conv, rows, kernel, table, inverse, groups);
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const int64_t groups = ctx->saved_data["groups"].toInt();
    variable_list out(5);
    if (saved[0].requires_grad()) out[0] = SPARKME_CALL(sparse_conv_grad_rows, grads[0], saved[1], saved[2], saved[3], groups);
    if (saved[1].requires_grad()) out[1] = SPARKME_CALL(sparse_conv_grad_kernel, saved[0], grads[0], saved[2], groups);
    return out;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, Autograd, m) {
  m.impl("sparse_conv", differentiable<SparseConv>());
  m.impl("sparse_conv_grad_rows", no_gradient());
  m.impl("sparse_conv_grad_kernel", no_gradient());
}

}  // namespace sparkme
