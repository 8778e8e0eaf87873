// The gradients of linear layers.
#include "cpu/linear_layers.cpp"

#include "autograd.h"

namespace sparkme {
namespace {

struct Linear : Function<Linear> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &kernel, const Optional &bias) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({rows, kernel});
    ctx->saved_data["bias"] = differs(bias);
    return SPARKME_CALL(linear, rows, kernel, bias);
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &rows = saved[0], &kernel = saved[1], &grad = grads[0];
    variable_list out(3);
    if (rows.requires_grad()) out[0] = SPARKME_CALL(linear, grad, kernel.t(), std::nullopt);
    if (kernel.requires_grad()) out[1] = SPARKME_CALL(linear, rows.t(), grad, std::nullopt);
    if (ctx->saved_data["bias"].toBool()) out[2] = grad.sum(0);
    return out;
  }
};

struct LinearBatchNorm : Function<LinearBatchNorm> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &kernel, const Tensor &row_mean, const Tensor &gram,
                        const Tensor &mean, const Tensor &deviation, const Optional &weight, const Optional &bias,
                        const Optional &factor, const Optional &residual, Number ceiling) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor out = SPARKME_CALL(linear_batch_norm, rows, kernel, row_mean, gram, mean, deviation, weight, bias, factor,
                                    flat(residual), ceiling);
    ctx->save_for_backward(
        {rows, kernel, ceiling ? out : Tensor(), row_mean, gram, mean, deviation, kept(weight), kept(bias), kept(factor)});
    ctx->saved_data["ceiling"] = ceiling;
    if (differs(residual)) ctx->saved_data["residual"] = residual->sizes();
    return out;
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Optional weight = given(saved[7]), bias = given(saved[8]);
    auto [grad_rows, grad_kernel, sums, grad] =
        SPARKME_CALL(linear_batch_norm_grad, grads[0], saved[0], saved[1], given(saved[2]), saved[3], saved[4], saved[5],
                     saved[6], weight, given(saved[9]), ctx->saved_data["ceiling"].toOptional<double>());
    variable_list found(11);
    if (saved[0].requires_grad()) found[0] = grad_rows;
    if (saved[1].requires_grad()) found[1] = grad_kernel;
    if (differs(weight)) found[6] = sums.select(0, 1).to(weight->scalar_type());
    if (differs(bias)) found[7] = sums.select(0, 0).to(bias->scalar_type());
    if (ctx->saved_data.count("residual")) found[9] = like_residual(ctx, saved[2].defined() ? grad : grads[0]);
    return found;
  }
};

struct Mlp : Function<Mlp> {
  static variable_list forward(Context *ctx, const Tensor &rows, const Tensor &weight1, const Optional &bias1,
                               const Tensor &weight2, const Optional &bias2, const Optional &scale, const Optional &factor,
                               const Optional &residual) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, hidden] = SPARKME_CALL(mlp, rows, weight1, bias1, weight2, bias2, scale, factor, flat(residual));
    ctx->save_for_backward({rows, hidden, weight1, weight2, kept(bias2), kept(scale), kept(factor)});
    if (differs(residual)) ctx->saved_data["residual"] = residual->sizes();
    ctx->saved_data["needed"] = std::vector<int64_t>{rows.requires_grad(),    weight1.requires_grad(), differs(bias1),
                                                     weight2.requires_grad(), differs(bias2),          differs(scale)};
    ctx->mark_non_differentiable({hidden});
    ctx->set_materialize_grads(false);  // zeros for it would be as large
    return {out, hidden};
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(8);
    const auto saved = ctx->get_saved_variables();
    const auto needed = ctx->saved_data["needed"].toIntVector();
    auto [rows, weight1, bias1, weight2, bias2, scale] = SPARKME_CALL(
        mlp_grad, grads[0], saved[0], saved[1], saved[2], saved[3], given(saved[4]), given(saved[5]), given(saved[6]));
    variable_list out{rows, weight1, bias1, weight2, bias2, scale, Tensor(), Tensor()};
    for (size_t i = 0; i < needed.size(); ++i)
      if (!needed[i]) out[i] = Tensor();
    if (ctx->saved_data.count("residual")) out[7] = like_residual(ctx, grads[0].contiguous());
    return out;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, Autograd, m) {
  m.impl("linear", differentiable<Linear>());
  m.impl("linear_batch_norm", differentiable<LinearBatchNorm>());
  m.impl("mlp", differentiable<Mlp>());
  m.impl("linear_batch_norm_grad", no_gradient());
  m.impl("mlp_grad", no_gradient());
}

}  // namespace sparkme
