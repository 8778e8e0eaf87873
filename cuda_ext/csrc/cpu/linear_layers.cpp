// Linear layers: products with a kernel, alone, with the batch norm behind them, and two of them with GELU between.
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include "gemm.h"
#include "norm.h"
#include "products.h"

namespace sparkme {
namespace {

Tensor linear(const Tensor &rows, const Tensor &kernel, const Optional &bias) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && kernel.dim() == 2 && rows.size(1) == kernel.size(0), "kernel must be (", rows.size(-1),
                    ", C_out)");
  return gemm(rows, kernel, bias);
}

// A 1x1 convolution to more channels and the batch norm behind it, without their result in between: it is four times as wide as
// what it is made of in a residual block, and would be written once and read four times.
//
// With rows y (N, K), kernel W (K, C), x = y W, and the Gram matrix G = sum of (y - mean(y))' (y - mean(y)):
//
// Statistics: mean(x) = mean(y) W, and var(x) = diag(W' G W) / N.
//
// Forward: x block by block, normalised before it leaves the cache.
//
// Backward: with g the gradient of the norm's result, a = weight / deviation, s1 = sum of g, and
// s2 = sum of g (x - mean(x)) / deviation, the gradient of x is a (g - s1 / N - (x - mean(x)) / deviation * s2 / N).
// As x = y W, all of it is made of products of y, g and W. With P = y' g and M = W diag(a s2 / (N deviation)) W',
//     s2 = (colsum(W * P) - mean(x) s1) / deviation
//     dW = (P - mean(y)' s1 - G W diag(s2 / (N deviation))) diag(a)
//     dy = g (W diag(a))' - (y - mean(y)) M - (W diag(a)) s1 / N.
//
// That costs the products with G and M, K / C of the forward pass each, and saves x.

constexpr int64_t kBlockBytes = int64_t{2} << 20;  // of x

void check_product(const Tensor &rows, const Tensor &kernel) {
  TORCH_CHECK_VALUE(
      rows.dim() == 2 && kernel.dim() == 2 && rows.size(1) == kernel.size(0) && rows.scalar_type() == kernel.scalar_type(),
      "kernel must be (", rows.size(-1), ", C), got ", kernel.sizes());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> product_statistics(const Tensor &rows, const Tensor &kernel) {
  check_product(rows, kernel);
  const Tensor rows_ = rows.contiguous();
  const auto sums = sum_type(rows);
  const Tensor row_mean = std::get<0>(batch_statistics(rows_));
  const Tensor gram = gemm((rows_ - row_mean).to(rows_.scalar_type()).t(), rows_).to(sums);
  const Tensor wide = kernel.to(sums);
  const Tensor mean = gemm(row_mean.unsqueeze(0), wide).squeeze(0);
  const Tensor squares = (wide * gemm(gram, wide)).sum(0, false, at::kDouble).to(sums);
  const Tensor variance = squares.clamp_min(0) / static_cast<double>(std::max<int64_t>(1, rows_.size(0)));
  return {row_mean, gram, mean, variance};
}

Tensor linear_batch_norm(const Tensor &rows, const Tensor &kernel, const Tensor & /*row_mean*/, const Tensor & /*gram*/,
                         const Tensor &mean, const Tensor &inverse_deviation, const Optional &weight, const Optional &bias,
                         const Optional &factor, const Optional &residual, Number ceiling) {
  check_product(rows, kernel);
  const Tensor rows_ = rows.contiguous();
  const int64_t num_rows = rows_.size(0), channels = kernel.size(1);
  Tensor out = at::empty({num_rows, channels}, rows_.options());
  const Optional added = residual ? Optional(residual_of(*residual, out)) : std::nullopt;
  const Norm norm(out, mean, inverse_deviation, weight, bias, factor, ceiling);
  const int64_t block = std::max<int64_t>(64, kBlockBytes / std::max<int64_t>(1, channels * rows_.element_size()));
  for (int64_t first = 0; first < num_rows; first += block) {
    const int64_t count = std::min(block, num_rows - first);
    const Tensor product = gemm(rows_.narrow(0, first, count), kernel);
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, out.scalar_type(), "linear_batch_norm", [&] {
      const scalar_t *source = product.const_data_ptr<scalar_t>(), *residual_data = data_or_null<scalar_t>(added);
      scalar_t *target = out.mutable_data_ptr<scalar_t>();
      const Parts parts(count);
      parts.each([&](int64_t part) {
        const int64_t begin = parts.begin(part), at = (first + begin) * channels;
        NormRows<scalar_t> x = norm.part<scalar_t>(first + begin, parts.rows(part));
        x.rows = source + begin * channels;
        kernels_of<scalar_t>().normalise(x, residual_data ? residual_data + at : nullptr, target + at);
      });
    });
  }
  return out;
}

// grad where 0 < out < ceiling, and the sum of that times the factor, for each channel.
Pair masked_and_summed(const Tensor &grad, const Optional &out, double ceiling, const Optional &factors, at::ScalarType sums) {
  const int64_t channels = grad.size(1);
  const Parts parts(grad.size(0));
  const Tensor partial = at::empty({parts.count(), channels}, grad.options().dtype(sums));
  Tensor masked = out ? at::empty_like(grad) : grad;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, grad.scalar_type(), "column_sums", [&] {
    const scalar_t *out_data = data_or_null<scalar_t>(out);
    scalar_t *target = out ? masked.mutable_data_ptr<scalar_t>() : nullptr;
    parts.each([&](int64_t part) {
      const int64_t first = parts.begin(part), at = first * channels;
      kernels_of<scalar_t>().masked_sums(
          grad.const_data_ptr<scalar_t>() + at, out_data ? out_data + at : nullptr, ceiling_in<scalar_t>(ceiling),
          factors ? factors->const_data_ptr<Sum<scalar_t>>() + first : nullptr, parts.rows(part), channels,
          partial.mutable_data_ptr<Sum<scalar_t>>() + part * channels, target ? target + at : nullptr);
    });
  });
  return {masked, partial.sum(0, false, at::kDouble).to(sums)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_batch_norm_grad(const Tensor &grad, const Tensor &rows, const Tensor &kernel,
                                                                  const Optional &out, const Tensor &row_mean,
                                                                  const Tensor &gram, const Tensor &mean,
                                                                  const Tensor &inverse_deviation, const Optional &weight,
                                                                  const Optional &factor, Number ceiling) {
  check_product(rows, kernel);
  const Tensor rows_ = rows.contiguous(), grad_ = grad.contiguous();
  const auto sums = sum_type(rows), type = rows.scalar_type();
  Optional out_;
  if (out) {
    check_like("out", *out, grad_);
    out_ = out->contiguous();
  }
  const Optional factors = per_row(factor, grad_);
  auto [masked, sum] = masked_and_summed(grad_, out_, ceiling_or_nan(ceiling), factors, sums);
  const Tensor g = factors ? (masked * factors->unsqueeze(1)).to(type) : masked;
  const double num_rows = static_cast<double>(std::max<int64_t>(1, rows_.size(0)));

  const Tensor wide = kernel.to(sums), products = gemm(rows_.t(), g).to(sums);
  const Tensor second = ((wide * products).sum(0, false, at::kDouble).to(sums) - mean * sum) * inverse_deviation;
  const Tensor scale = per_channel("weight", weight, grad_, 1) * inverse_deviation;
  const Tensor slope = second * inverse_deviation / num_rows;
  const Tensor grad_kernel = (products - row_mean.unsqueeze(1) * sum - gemm(gram, wide * slope)) * scale;

  const Tensor scaled = wide * scale;
  const Tensor m = gemm(wide * (scale * slope), wide.t());
  const Tensor constant = gemm(row_mean.unsqueeze(0), m).squeeze(0) - gemm(scaled, (sum / num_rows).unsqueeze(1)).squeeze(1);
  const Tensor grad_rows = gemm(g, scaled.to(type).t(), constant.to(type)).sub_(gemm(rows_, m.to(type)));
  return {grad_rows, grad_kernel.to(type), at::stack({sum, second}), out ? masked : at::empty({0}, grad_.options())};
}

// Two linear layers with GELU between them, as in ConvNeXt's blocks, where the layer between is four times as wide as the rest.
// A factor for each channel of the result, ConvNeXt's layer scale, one for each sample, drop path's, and the residual are part
// of it.
//
// What is kept of it is the first layer's result; GELU's is made again for the gradient, a block of rows at a time, and so is
// its derivative, so that neither of them leaves the cache.

constexpr int64_t kMlpBlockBytes = int64_t{2} << 20;  // of the wide layer
constexpr int64_t kFewestRows = 512;                  // of a block: fewer would read the weights too often

// The rows are cut into blocks of the same size.
struct Blocks {
  int64_t rows, count;

  explicit Blocks(const Tensor &hidden) : rows(hidden.size(0)) {
    const int64_t bytes = rows * hidden.size(1) * hidden.element_size();
    count = std::clamp<int64_t>((bytes + kMlpBlockBytes - 1) / kMlpBlockBytes, 1, std::max<int64_t>(1, rows / kFewestRows));
  }

  // body(first, count of rows) of each.
  template <typename Body>
  void each(const Body &body) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = rows * i / count;
      body(first, rows * (i + 1) / count - first);
    }
  }
};

void check_weights(const Tensor &rows, const Tensor &weight1, const Tensor &weight2) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && weight1.dim() == 2 && weight2.dim() == 2 && weight1.size(1) == rows.size(1) &&
                        weight2.size(1) == weight1.size(0),
                    "weights ", weight1.sizes(), " and ", weight2.sizes(), " do not fit rows ", rows.sizes());
}

// body(first, count) of numbers that one thread treats at a time.
template <typename Body>
void each_piece(int64_t numbers, const Body &body) {
  at::parallel_for(0, numbers, 8192, [&](int64_t begin, int64_t end) { body(begin, end - begin); });
}

Tensor gelu_of(const Tensor &x) {
  Tensor out = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "mlp", [&] {
    const scalar_t *source = x.const_data_ptr<scalar_t>();
    scalar_t *target = out.mutable_data_ptr<scalar_t>();
    each_piece(x.numel(),
               [&](int64_t first, int64_t count) { kernels_of<scalar_t>().gelu(source + first, count, target + first); });
  });
  return out;
}

// GELU of x; grad becomes its product with the derivative.
Tensor gelu_with_grad(const Tensor &x, Tensor &grad) {
  Tensor out = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "mlp_grad", [&] {
    const scalar_t *source = x.const_data_ptr<scalar_t>();
    scalar_t *target = out.mutable_data_ptr<scalar_t>(), *changed = grad.mutable_data_ptr<scalar_t>();
    each_piece(x.numel(), [&](int64_t first, int64_t count) {
      kernels_of<scalar_t>().gelu_with_grad(source + first, count, target + first, changed + first);
    });
  });
  return out;
}

// What is done with the result: times the channel's and the sample's factor, plus the residual.
struct Follows {
  Tensor scale, shift;
  Optional factors, residual;

  Follows(const Tensor &out, const Optional &scale_, const Optional &factor, const Optional &residual_)
      : scale(per_channel("scale", scale_, out, 1)), shift(at::zeros_like(scale)), factors(per_row(factor, out)) {
    if (residual_) residual = residual_of(*residual_, out);
  }

  // Of rows [first, ...), to their place.
  void apply(const Tensor &rows, int64_t first, const Tensor &out) const {
    const int64_t channels = rows.size(1);
    const Tensor rows_ = rows.contiguous();
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows.scalar_type(), "mlp", [&] {
      using S = Sum<scalar_t>;
      const Parts parts(rows.size(0));
      parts.each([&](int64_t part) {
        const int64_t begin = parts.begin(part), at = (first + begin) * channels;
        const NormRows<scalar_t> x{rows_.const_data_ptr<scalar_t>() + begin * channels,
                                   parts.rows(part),
                                   channels,
                                   scale.const_data_ptr<S>(),
                                   shift.const_data_ptr<S>(),
                                   factors ? factors->const_data_ptr<S>() + first + begin : nullptr,
                                   static_cast<S>(ceiling_or_nan(std::nullopt))};
        kernels_of<scalar_t>().normalise(x, residual ? residual->const_data_ptr<scalar_t>() + at : nullptr,
                                         out.mutable_data_ptr<scalar_t>() + at);
      });
    });
  }
};

Pair mlp(const Tensor &rows, const Tensor &weight1, const Optional &bias1, const Tensor &weight2, const Optional &bias2,
         const Optional &scale, const Optional &factor, const Optional &residual) {
  check_weights(rows, weight1, weight2);
  const Tensor hidden = gemm(rows.contiguous(), weight1.t(), bias1).contiguous();
  const Blocks blocks(hidden);
  const bool follows = scale || factor || residual;
  Tensor out = blocks.count == 1 && !follows ? Tensor() : at::empty({rows.size(0), weight2.size(0)}, rows.options());
  const std::optional<Follows> follow =
      follows ? std::optional<Follows>(std::in_place, out, scale, factor, residual) : std::nullopt;
  blocks.each([&](int64_t first, int64_t count) {
    const Tensor part = gemm(gelu_of(hidden.narrow(0, first, count)), weight2.t(), bias2);
    if (follow) {
      follow->apply(part, first, out);
    } else if (out.defined()) {
      out.narrow(0, first, count).copy_(part);
    } else {
      out = part;
    }
  });
  return {out, hidden};
}

// sums += left' right, or = where it is the first.
void add_product(const Tensor &left, const Tensor &right, Tensor &sums, bool first) {
  if (left.scalar_type() != at::kBFloat16) {
    add_outer_product(left, right, sums, first);
  } else if (first) {
    sums.copy_(gemm(left.t(), right));
  } else {
    sums.add_(gemm(left.t(), right));
  }
}

// (C) of (N, C), perhaps times the rows' factors, in the type of sums.
Tensor column_sums(const Tensor &rows, const Optional &factors = std::nullopt) {
  return std::get<1>(masked_and_summed(rows, std::nullopt, 0, factors, sum_type(rows)));
}

// From the gradient of the second weight without the scale: that of the scale, and with it.
template <typename T>
Tensor scaled_gradient(Tensor &grad_weight, const Tensor &weight, const Tensor &scale) {
  const int64_t width = weight.size(1);
  Tensor grad_scale = at::empty({weight.size(0)}, grad_weight.options());
  const T *weights = weight.const_data_ptr<T>();
  const Sum<T> *scales = scale.const_data_ptr<Sum<T>>();
  Sum<T> *grads = grad_weight.mutable_data_ptr<Sum<T>>(), *out = grad_scale.mutable_data_ptr<Sum<T>>();
  at::parallel_for(0, weight.size(0), std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t c = begin; c < end; ++c)
                       out[c] = kernels_of<T>().dot_and_scale(weights + c * width, width, scales[c], grads + c * width);
                   });
  return grad_scale;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlp_grad(const Tensor &grad, const Tensor &rows,
                                                                    const Tensor &hidden, const Tensor &weight1,
                                                                    const Tensor &weight2, const Optional &bias2,
                                                                    const Optional &scale, const Optional &factor) {
  check_weights(rows, weight1, weight2);
  const Optional factors = per_row(factor, rows);
  const Tensor grad_ = grad.contiguous(), rows_ = rows.contiguous(), hidden_ = hidden.contiguous();
  const auto sums = sum_type(rows), type = rows.scalar_type();
  const auto options = rows_.options().dtype(sums);
  const Blocks blocks(hidden_);
  Tensor grad_rows = blocks.count == 1 ? Tensor() : at::empty_like(rows_);
  Tensor grad_weight1 = at::empty(weight1.sizes(), options), grad_weight2 = at::empty(weight2.sizes(), options);
  Tensor grad_bias1;
  blocks.each([&](int64_t first, int64_t count) {
    Tensor g = grad_.narrow(0, first, count);
    if (factors) g = (g * factors->narrow(0, first, count).unsqueeze(1)).to(type);
    Tensor wide = gemm(scale ? (g * *scale).to(type) : g, weight2).contiguous();
    const Tensor active = gelu_with_grad(hidden_.narrow(0, first, count), wide);
    add_product(g, active, grad_weight2, first == 0);
    add_product(wide, rows_.narrow(0, first, count), grad_weight1, first == 0);
    const Tensor sum = column_sums(wide);
    grad_bias1 = grad_bias1.defined() ? grad_bias1.add_(sum) : sum;
    const Tensor part = gemm(wide, weight1);
    if (grad_rows.defined()) {
      grad_rows.narrow(0, first, count).copy_(part);
    } else {
      grad_rows = part;
    }
  });
  Tensor grad_bias2 = column_sums(grad_, factors), grad_scale = at::empty({0}, options);
  if (scale) {
    const Tensor scales = scale->to(sums).contiguous(), weight = weight2.contiguous();
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, type, "mlp_grad",
                                   [&] { grad_scale = scaled_gradient<scalar_t>(grad_weight2, weight, scales); });
    if (bias2) grad_scale.addcmul_(bias2->to(sums), grad_bias2);
    grad_bias2.mul_(scales);
  }
  return {grad_rows,           grad_weight1.to(type),
          grad_bias1.to(type), grad_weight2.to(type),
          grad_bias2.to(type), scale ? grad_scale.to(scale->scalar_type()) : grad_scale};
}

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, CPU, m) {
  m.impl("linear", linear);
  m.impl("product_statistics", product_statistics);
  m.impl("linear_batch_norm", linear_batch_norm);
  m.impl("linear_batch_norm_grad", linear_batch_norm_grad);
  m.impl("mlp", mlp);
  m.impl("mlp_grad", mlp_grad);
}

}  // namespace sparkme
