// The gradients of the operators, for the CPU and CUDA alike: which operator gives which, and what is kept for it.
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

namespace sparkme {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Number = std::optional<double>;
using Context = torch::autograd::AutogradContext;
using Sizes = at::IntArrayRef;
using Pair = std::tuple<Tensor, Tensor>;
using torch::autograd::Function;
using torch::autograd::variable_list;

// op::NAME(...) calls torch.ops.sparkme.NAME. (Without the namespace at::linear would be found as well.)
namespace op {

#define SPARKME_OPERATOR(NAME, ...)                                                                                        \
  template <typename... Args>                                                                                              \
  auto NAME(Args &&...args) {                                                                                              \
    static const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow("sparkme::" #NAME, "").typed<__VA_ARGS__>(); \
    return handle.call(std::forward<Args>(args)...);                                                                       \
  }

SPARKME_OPERATOR(sparse_conv, Tensor(const Tensor &, const Tensor &, const Tensor &, const Optional &, int64_t))
SPARKME_OPERATOR(sparse_conv_grad_rows, Tensor(const Tensor &, const Tensor &, const Tensor &, const Tensor &, int64_t))
SPARKME_OPERATOR(sparse_conv_grad_kernel, Tensor(const Tensor &, const Tensor &, const Tensor &, int64_t))
SPARKME_OPERATOR(depthwise_conv, Tensor(const Tensor &, const Tensor &, const Optional &, const Tensor &, const Tensor &,
                                        int64_t, Sizes, int64_t, int64_t))
SPARKME_OPERATOR(depthwise_conv_grad_rows,
                 Tensor(const Tensor &, const Tensor &, const Tensor &, const Tensor &, int64_t, Sizes, int64_t, int64_t))
SPARKME_OPERATOR(depthwise_conv_grad_kernel,
                 Tensor(const Tensor &, const Tensor &, const Tensor &, const Tensor &, int64_t, Sizes, int64_t, int64_t))
SPARKME_OPERATOR(max_pool, Pair(const Tensor &, const Tensor &, const Tensor &))
SPARKME_OPERATOR(max_pool_grad_rows, Tensor(const Tensor &, const Tensor &, const Tensor &))
SPARKME_OPERATOR(avg_pool, Tensor(const Tensor &, const Tensor &, const Tensor &))
SPARKME_OPERATOR(voxelise, Tensor(const Tensor &, const Tensor &, const Tensor &, int64_t))
SPARKME_OPERATOR(densify, Tensor(const Tensor &, const Tensor &, const Tensor &, int64_t, const Optional &))
SPARKME_OPERATOR(linear, Tensor(const Tensor &, const Tensor &, const Optional &))
SPARKME_OPERATOR(batch_norm, Tensor(const Tensor &, const Tensor &, const Tensor &, const Optional &, const Optional &,
                                    const Optional &, const Optional &, Number, bool))
SPARKME_OPERATOR(batch_norm_grad_sums, Pair(const Tensor &, const Tensor &, const Optional &, const Tensor &, const Tensor &,
                                            const Optional &, const Optional &, const Optional &, Number))
SPARKME_OPERATOR(batch_norm_grad_rows, Tensor(const Tensor &, const Tensor &, const Tensor &, const Tensor &, const Optional &,
                                              const Optional &, const Optional &, Number, const Optional &, Number))
SPARKME_OPERATOR(linear_batch_norm,
                 Tensor(const Tensor &, const Tensor &, const Tensor &, const Tensor &, const Tensor &, const Tensor &,
                        const Optional &, const Optional &, const Optional &, const Optional &, Number))
SPARKME_OPERATOR(linear_batch_norm_grad,
                 std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor &, const Tensor &, const Tensor &, const Optional &,
                                                            const Tensor &, const Tensor &, const Tensor &, const Tensor &,
                                                            const Optional &, const Optional &, Number))
SPARKME_OPERATOR(layer_norm, Pair(const Tensor &, const Optional &, const Optional &, double))
SPARKME_OPERATOR(layer_norm_grad, Pair(const Tensor &, const Tensor &, const Tensor &, const Optional &))
SPARKME_OPERATOR(mlp, Pair(const Tensor &, const Tensor &, const Optional &, const Tensor &, const Optional &, const Optional &,
                           const Optional &, const Optional &))
SPARKME_OPERATOR(mlp_grad,
                 std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor &, const Tensor &, const Tensor &,
                                                                            const Tensor &, const Tensor &, const Optional &,
                                                                            const Optional &, const Optional &))

}  // namespace op

bool differs(const Optional &value) { return value && value->requires_grad(); }

// (N, C) of (..., C). Below autograd it is no view that keeps its base: such a one autograd's sums could not be made in place.
Tensor flat(const Tensor &value) { return value.dim() == 2 ? value : value.flatten(0, -2); }
Optional flat(const Optional &value) { return value ? Optional(flat(*value)) : value; }

// Undefined where there is none, as save_for_backward keeps it; and back.
Tensor kept(const Optional &value) { return value.value_or(Tensor()); }
Optional given(const Tensor &value) { return value.defined() ? Optional(value) : std::nullopt; }

struct SparseConv : Function<SparseConv> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &kernel, const Tensor &table, const Optional &inverse,
                        int64_t groups) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({rows, kernel, table, kept(inverse)});
    ctx->saved_data["groups"] = groups;
    return op::sparse_conv(rows, kernel, table, inverse, groups);
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const int64_t groups = ctx->saved_data["groups"].toInt();
    variable_list out(5);
    if (saved[0].requires_grad()) out[0] = op::sparse_conv_grad_rows(grads[0], saved[1], saved[2], saved[3], groups);
    if (saved[1].requires_grad()) out[1] = op::sparse_conv_grad_kernel(saved[0], grads[0], saved[2], groups);
    return out;
  }
};

struct DepthwiseConv : Function<DepthwiseConv> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &kernel, const Optional &bias, const Tensor &slots,
                        const Tensor &patches, int64_t pixels, Sizes kernel_size, int64_t stride, int64_t dilation) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({rows, kernel, slots, patches});
    ctx->saved_data["bias"] = differs(bias);
    ctx->saved_data["geometry"] = std::vector<int64_t>{pixels, kernel_size[0], kernel_size[1], stride, dilation};
    return op::depthwise_conv(rows, kernel, bias, slots, patches, pixels, kernel_size, stride, dilation);
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto geometry = ctx->saved_data["geometry"].toIntVector();
    const Sizes size(geometry.data() + 1, 2);
    variable_list out(9);
    if (saved[0].requires_grad())
      out[0] =
          op::depthwise_conv_grad_rows(grads[0], saved[1], saved[2], saved[3], geometry[0], size, geometry[3], geometry[4]);
    if (saved[1].requires_grad())
      out[1] =
          op::depthwise_conv_grad_kernel(saved[0], grads[0], saved[2], saved[3], geometry[0], size, geometry[3], geometry[4]);
    if (ctx->saved_data["bias"].toBool()) out[2] = grads[0].sum(0);
    return out;
  }
};

struct MaxPool : Function<MaxPool> {
  static variable_list forward(Context *ctx, const Tensor &rows, const Tensor &table, const Tensor &inverse) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, taken] = op::max_pool(rows, table, inverse);
    ctx->save_for_backward({taken, inverse});
    ctx->mark_non_differentiable({taken});
    ctx->set_materialize_grads(false);
    return {out, taken};
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(3);
    const auto saved = ctx->get_saved_variables();
    return {op::max_pool_grad_rows(grads[0], saved[0], saved[1]), Tensor(), Tensor()};
  }
};

struct AvgPool : Function<AvgPool> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &table, const Tensor &inverse) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({table, inverse});
    return op::avg_pool(rows, table, inverse);
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    return {op::avg_pool(grads[0], saved[1], saved[0]), Tensor(), Tensor()};
  }
};

struct Voxelise : Function<Voxelise> {
  static Tensor forward(Context *ctx, const Tensor &dense, const Tensor &slots, const Tensor &patches, int64_t pixels) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({slots, patches});
    ctx->saved_data["pixels"] = pixels;
    return op::voxelise(dense, slots, patches, pixels);
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    return {op::densify(grads[0], saved[0], saved[1], ctx->saved_data["pixels"].toInt(), std::nullopt), Tensor(), Tensor(),
            Tensor()};
  }
};

struct Densify : Function<Densify> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &slots, const Tensor &patches, int64_t pixels,
                        const Optional &fill) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({slots, patches});
    ctx->saved_data["pixels"] = pixels;
    ctx->saved_data["rows"] = rows.requires_grad();
    ctx->saved_data["fill"] = differs(fill);
    ctx->saved_data["type"] = fill ? fill->scalar_type() : rows.scalar_type();
    return op::densify(rows, slots, patches, pixels, fill);
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor grad_rows = op::voxelise(grads[0], saved[0], saved[1], ctx->saved_data["pixels"].toInt());
    variable_list out(5);
    if (ctx->saved_data["rows"].toBool()) out[0] = grad_rows;
    if (ctx->saved_data["fill"].toBool()) {  // of all pixels, less the visible ones
      const auto wide = at::promote_types(grads[0].scalar_type(), at::kFloat);
      const Tensor pixels = grads[0].permute({0, 2, 3, 1}).flatten(0, 2);
      out[4] = (pixels.sum(0, false, wide) - grad_rows.sum(0, false, wide)).to(ctx->saved_data["type"].toScalarType());
    }
    return out;
  }
};

struct Linear : Function<Linear> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &kernel, const Optional &bias) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({rows, kernel});
    ctx->saved_data["bias"] = differs(bias);
    return op::linear(rows, kernel, bias);
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &rows = saved[0], &kernel = saved[1], &grad = grads[0];
    variable_list out(3);
    if (rows.requires_grad()) out[0] = op::linear(grad, kernel.t(), std::nullopt);
    if (kernel.requires_grad()) out[1] = op::linear(rows.t(), grad, std::nullopt);
    if (ctx->saved_data["bias"].toBool()) out[2] = grad.sum(0);
    return out;
  }
};

Tensor like_residual(Context *ctx, const Tensor &grad) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return grad.view(ctx->saved_data["residual"].toIntVector());
}

struct BatchNorm : Function<BatchNorm> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &mean, const Tensor &deviation, const Optional &weight,
                        const Optional &bias, const Optional &factor, const Optional &residual, Number ceiling, bool training) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor out = op::batch_norm(rows, mean, deviation, weight, bias, factor, flat(residual), ceiling, training);
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
    auto [grad, sums] = op::batch_norm_grad_sums(grads[0], rows, out, mean, deviation, weight, bias, factor, ceiling);
    if (out) {
      ceiling = std::nullopt;  // done
    } else {
      grad = grads[0];
    }
    variable_list found(9);
    if (rows.requires_grad()) {
      const Optional statistics = ctx->saved_data["training"].toBool() ? Optional(sums) : std::nullopt;
      found[0] = op::batch_norm_grad_rows(grad, rows, mean, deviation, weight, bias, factor, ceiling, statistics, std::nullopt);
    }
    if (differs(weight)) found[3] = sums.select(0, 1).to(weight->scalar_type());
    if (differs(bias)) found[4] = sums.select(0, 0).to(bias->scalar_type());
    if (ctx->saved_data.count("residual")) found[6] = like_residual(ctx, grad);
    return found;
  }
};

struct LinearBatchNorm : Function<LinearBatchNorm> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &kernel, const Tensor &row_mean, const Tensor &gram,
                        const Tensor &mean, const Tensor &deviation, const Optional &weight, const Optional &bias,
                        const Optional &factor, const Optional &residual, Number ceiling) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor out =
        op::linear_batch_norm(rows, kernel, row_mean, gram, mean, deviation, weight, bias, factor, flat(residual), ceiling);
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
        op::linear_batch_norm_grad(grads[0], saved[0], saved[1], given(saved[2]), saved[3], saved[4], saved[5], saved[6],
                                   weight, given(saved[9]), ctx->saved_data["ceiling"].toOptional<double>());
    variable_list found(11);
    if (saved[0].requires_grad()) found[0] = grad_rows;
    if (saved[1].requires_grad()) found[1] = grad_kernel;
    if (differs(weight)) found[6] = sums.select(0, 1).to(weight->scalar_type());
    if (differs(bias)) found[7] = sums.select(0, 0).to(bias->scalar_type());
    if (ctx->saved_data.count("residual")) found[9] = like_residual(ctx, saved[2].defined() ? grad : grads[0]);
    return found;
  }
};

struct LayerNorm : Function<LayerNorm> {
  static variable_list forward(Context *ctx, const Tensor &rows, const Optional &weight, const Optional &bias, double epsilon) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, statistics] = op::layer_norm(rows, weight, bias, epsilon);
    ctx->save_for_backward({rows, statistics, kept(weight), kept(bias)});
    ctx->mark_non_differentiable({statistics});
    ctx->set_materialize_grads(false);
    return {out, statistics};
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(4);
    const auto saved = ctx->get_saved_variables();
    const Optional weight = given(saved[2]), bias = given(saved[3]);
    auto [grad_rows, sums] = op::layer_norm_grad(grads[0], saved[0], saved[1], weight);
    variable_list found(4);
    if (saved[0].requires_grad()) found[0] = grad_rows;
    if (differs(weight)) found[1] = sums.select(0, 1).to(weight->scalar_type());
    if (differs(bias)) found[2] = sums.select(0, 0).to(bias->scalar_type());
    return found;
  }
};

struct Mlp : Function<Mlp> {
  static variable_list forward(Context *ctx, const Tensor &rows, const Tensor &weight1, const Optional &bias1,
                               const Tensor &weight2, const Optional &bias2, const Optional &scale, const Optional &factor,
                               const Optional &residual) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, hidden] = op::mlp(rows, weight1, bias1, weight2, bias2, scale, factor, flat(residual));
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
    auto [rows, weight1, bias1, weight2, bias2, scale] =
        op::mlp_grad(grads[0], saved[0], saved[1], saved[2], saved[3], given(saved[4]), given(saved[5]), given(saved[6]));
    variable_list out{rows, weight1, bias1, weight2, bias2, scale, Tensor(), Tensor()};
    for (size_t i = 0; i < needed.size(); ++i)
      if (!needed[i]) out[i] = Tensor();
    if (ctx->saved_data.count("residual")) out[7] = like_residual(ctx, grads[0].contiguous());
    return out;
  }
};

// A kernel that runs F, with the arguments of its forward pass.
template <typename F, typename... Args>
auto kernel_of(Tensor (*)(Context *, Args...)) {
  return +[](Args... args) -> Tensor { return F::apply(args...); };
}

template <typename F, typename... Args>
auto kernel_of(variable_list (*)(Context *, Args...)) {
  return +[](Args... args) -> Pair {
    const variable_list out = F::apply(args...);
    return {out[0], out[1]};
  };
}

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, Autograd, m) {
  m.impl("sparse_conv", kernel_of<SparseConv>(&SparseConv::forward));
  m.impl("depthwise_conv", kernel_of<DepthwiseConv>(&DepthwiseConv::forward));
  m.impl("max_pool", kernel_of<MaxPool>(&MaxPool::forward));
  m.impl("avg_pool", kernel_of<AvgPool>(&AvgPool::forward));
  m.impl("voxelise", kernel_of<Voxelise>(&Voxelise::forward));
  m.impl("densify", kernel_of<Densify>(&Densify::forward));
  m.impl("linear", kernel_of<Linear>(&Linear::forward));
  m.impl("batch_norm", kernel_of<BatchNorm>(&BatchNorm::forward));
  m.impl("linear_batch_norm", kernel_of<LinearBatchNorm>(&LinearBatchNorm::forward));
  m.impl("layer_norm", kernel_of<LayerNorm>(&LayerNorm::forward));
  m.impl("mlp", kernel_of<Mlp>(&Mlp::forward));
  // What gradients are made of has none of its own, and says so when it is asked for one.
  for (const char *name : {"sparse_conv_grad_rows", "sparse_conv_grad_kernel", "depthwise_conv_grad_rows",
                           "depthwise_conv_grad_kernel", "max_pool_grad_rows", "batch_norm_grad_sums", "batch_norm_grad_rows",
                           "linear_batch_norm_grad", "layer_norm_grad", "mlp_grad"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace sparkme
