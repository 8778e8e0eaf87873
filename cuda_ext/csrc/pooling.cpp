// The gradients of pooling.
#include "cpu/pooling.cpp"

#include "autograd.h"

namespace sparkme {
namespace {

struct MaxPool : Function<MaxPool> {
  static variable_list forward(Context *ctx, const Tensor &rows, const Tensor &table, const Tensor &inverse) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, taken] = SPARKME_CALL(max_pool, rows, table, inverse);
    ctx->save_for_backward({taken, inverse});
    ctx->mark_non_differentiable({taken});
    ctx->set_materialize_grads(false);
    return {out, taken};
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(3);
    const auto saved = ctx->get_saved_variables();
    return {SPARKME_CALL(max_pool_grad_rows, grads[0], saved[0], saved[1]), Tensor(), Tensor()};
  }
};

struct AvgPool : Function<AvgPool> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &table, const Tensor &inverse) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({table, inverse});
    return SPARKME_CALL(avg_pool, rows, table, inverse);
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    return {SPARKME_CALL(avg_pool, grads[0], saved[1], saved[0]), Tensor(), Tensor()};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, Autograd, m) {
  m.impl("max_pool", differentiable<MaxPool>());
  m.impl("avg_pool", differentiable<AvgPool>());
  m.impl("max_pool_grad_rows", no_gradient());
}

}  // namespace sparkme
