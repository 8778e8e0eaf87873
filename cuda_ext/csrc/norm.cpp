// The gradients of batch norm and layer norm.
#include "cpu/norm.cpp"

#include "autograd.h"

namespace sparkme {
namespace {

struct BatchNorm : Function<BatchNorm> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &mean, const Tensor &deviation, const Optional &weight,
                        const Optional &bias, const Optional &factor, const Optional &residual, Number ceiling, bool training) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor out = SPARKME_CALL(batch_norm, rows, mean, deviation, weight, bias, factor, flat(residual), ceiling, training);
    // Only after a residual it cannot be worked out from the rows where the result was clamped.
    ctx->save_for_backward(
        {rows, ceiling && residual ? out : Tensor(), mean, deviation, kept(weight), kept(bias), kept(factor)});
    ctx->saved_data["ceiling"] = ceiling;
    ctx->saved_data["training"] = training;
    if (differs(residual)) ctx->saved_data["residual"] = residual->sizes();
    return out;
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &rows = saved[0], &mean = saved[2], &deviation = saved[3];
    const Optional out = given(saved[1]), weight = given(saved[4]), bias = given(saved[5]), factor = given(saved[6]);
    Number ceiling = ctx->saved_data["ceiling"].toOptional<double>();
    auto [grad, sums] = SPARKME_CALL(batch_norm_grad_sums, grads[0], rows, out, mean, deviation, weight, bias, factor, ceiling);
    if (out) {
      ceiling = std::nullopt;  // done
    } else {
      grad = grads[0];
    }
    variable_list found(9);
    if (rows.requires_grad()) {
      const Optional statistics = ctx->saved_data["training"].toBool() ? Optional(sums) : std::nullopt;
      found[0] = SPARKME_CALL(batch_norm_grad_rows, grad, rows, mean, deviation, weight, bias, factor, ceiling, statistics,
                              std::nullopt);
    }
    if (differs(weight)) found[3] = sums.select(0, 1).to(weight->scalar_type());
    if (differs(bias)) found[4] = sums.select(0, 0).to(bias->scalar_type());
    if (ctx->saved_data.count("residual")) found[6] = like_residual(ctx, grad);
    return found;
  }
};

struct LayerNorm : Function<LayerNorm> {
  static variable_list forward(Context *ctx, const Tensor &rows, const Optional &weight, const Optional &bias, double epsilon) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, statistics] = SPARKME_CALL(layer_norm, rows, weight, bias, epsilon);
    ctx->save_for_backward({rows, statistics, kept(weight), kept(bias)});
    ctx->mark_non_differentiable({statistics});
    ctx->set_materialize_grads(false);
    return {out, statistics};
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(4);
    const auto saved = ctx->get_saved_variables();
    const Optional weight = given(saved[2]), bias = given(saved[3]);
    auto [grad_rows, sums] = SPARKME_CALL(layer_norm_grad, grads[0], saved[0], saved[1], weight);
    variable_list found(4);
    if (saved[0].requires_grad()) found[0] = grad_rows;
    if (differs(weight)) found[1] = sums.select(0, 1).to(weight->scalar_type());
    if (differs(bias)) found[2] = sums.select(0, 0).to(bias->scalar_type());
    return found;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, Autograd, m) {
  m.impl("batch_norm", differentiable<BatchNorm>());
  m.impl("layer_norm", differentiable<LayerNorm>());
  m.impl("batch_norm_grad_sums", no_gradient());
  m.impl("batch_norm_grad_rows", no_gradient());
  m.impl("layer_norm_grad", no_gradient());
}

}  // namespace sparkme
