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
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include "gemm.h"
#include "norm.h"

namespace sparkme {
namespace {

constexpr int64_t kBlockBytes = int64_t{2} << 20;  // of x

void check_product(const at::Tensor &rows, const at::Tensor &kernel) {
  TORCH_CHECK_VALUE(
      rows.dim() == 2 && kernel.dim() == 2 && rows.size(1) == kernel.size(0) && rows.scalar_type() == kernel.scalar_type(),
      "kernel must be (", rows.size(-1), ", C), got ", kernel.sizes());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> product_statistics(const at::Tensor &rows,
                                                                              const at::Tensor &kernel) {
  check_product(rows, kernel);
  const at::Tensor rows_ = rows.contiguous();
  const auto sums = sum_type(rows);
  const at::Tensor row_mean = std::get<0>(batch_statistics(rows_));
  const at::Tensor gram = gemm((rows_ - row_mean).to(rows_.scalar_type()).t(), rows_).to(sums);
  const at::Tensor wide = kernel.to(sums);
  const at::Tensor mean = gemm(row_mean.unsqueeze(0), wide).squeeze(0);
  const at::Tensor squares = (wide * gemm(gram, wide)).sum(0, false, at::kDouble).to(sums);
  const at::Tensor variance = squares.clamp_min(0) / static_cast<double>(std::max<int64_t>(1, rows_.size(0)));
  return {row_mean, gram, mean, variance};
}

at::Tensor linear_batch_norm(const at::Tensor &rows, const at::Tensor &kernel, const at::Tensor & /*row_mean*/,
                             const at::Tensor & /*gram*/, const at::Tensor &mean, const at::Tensor &inverse_deviation,
                             const Optional &weight, const Optional &bias, const Optional &factor, const Optional &residual,
                             std::optional<double> ceiling) {
  check_product(rows, kernel);
  const at::Tensor rows_ = rows.contiguous();
  const int64_t num_rows = rows_.size(0), channels = kernel.size(1);
  at::Tensor out = at::empty({num_rows, channels}, rows_.options());
  const Optional added = residual ? Optional(residual_of(*residual, out)) : std::nullopt;
  const Norm norm(out, mean, inverse_deviation, weight, bias, factor, ceiling);
  const int64_t block = std::max<int64_t>(64, kBlockBytes / std::max<int64_t>(1, channels * rows_.element_size()));
  for (int64_t first = 0; first < num_rows; first += block) {
    const int64_t count = std::min(block, num_rows - first);
    const at::Tensor product = gemm(rows_.narrow(0, first, count), kernel);
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
std::tuple<at::Tensor, at::Tensor> masked_and_summed(const at::Tensor &grad, const Optional &out, double ceiling,
                                                     const Optional &factors, at::ScalarType sums) {
  const int64_t channels = grad.size(1);
  const Parts parts(grad.size(0));
  const at::Tensor partial = at::empty({parts.count(), channels}, grad.options().dtype(sums));
  at::Tensor masked = out ? at::empty_like(grad) : grad;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, grad.scalar_type(), "linear_batch_norm_grad", [&] {
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

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_batch_norm_grad(
    const at::Tensor &grad, const at::Tensor &rows, const at::Tensor &kernel, const Optional &out, const at::Tensor &row_mean,
    const at::Tensor &gram, const at::Tensor &mean, const at::Tensor &inverse_deviation, const Optional &weight,
    const Optional &factor, std::optional<double> ceiling) {
  check_product(rows, kernel);
  const at::Tensor rows_ = rows.contiguous(), grad_ = grad.contiguous();
  const auto sums = sum_type(rows), type = rows.scalar_type();
  Optional out_;
  if (out) {
    check_like("out", *out, grad_);
    out_ = out->contiguous();
  }
  const Optional factors = per_row(factor, grad_);
  auto [masked, sum] = masked_and_summed(grad_, out_, ceiling_or_nan(ceiling), factors, sums);
  const at::Tensor g = factors ? (masked * factors->unsqueeze(1)).to(type) : masked;
  const double num_rows = static_cast<double>(std::max<int64_t>(1, rows_.size(0)));

  const at::Tensor wide = kernel.to(sums), products = gemm(rows_.t(), g).to(sums);
  const at::Tensor second = ((wide * products).sum(0, false, at::kDouble).to(sums) - mean * sum) * inverse_deviation;
  const at::Tensor scale = per_channel("weight", weight, grad_, 1) * inverse_deviation;
  const at::Tensor slope = second * inverse_deviation / num_rows;
  const at::Tensor grad_kernel = (products - row_mean.unsqueeze(1) * sum - gemm(gram, wide * slope)) * scale;

  const at::Tensor scaled = wide * scale;
  const at::Tensor m = gemm(wide * (scale * slope), wide.t());
  const at::Tensor constant =
      gemm(row_mean.unsqueeze(0), m).squeeze(0) - gemm(scaled, (sum / num_rows).unsqueeze(1)).squeeze(1);
  const at::Tensor grad_rows = gemm(g, scaled.to(type).t(), constant.to(type)).sub_(gemm(rows_, m.to(type)));
  return {grad_rows, grad_kernel.to(type), at::stack({sum, second}), out ? masked : at::empty({0}, grad_.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, CPU, m) {
  m.impl("product_statistics", product_statistics);
  m.impl("linear_batch_norm", linear_batch_norm);
  m.impl("linear_batch_norm_grad", linear_batch_norm_grad);
}

}  // namespace sparkme
