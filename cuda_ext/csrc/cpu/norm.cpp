// Batch norm of rows with what follows it in one pass: the factor of a drop path, a residual, a ReLU (with a ceiling,
// as ReLU6 has). Forward it reads the rows
// twice (statistics; result) and backward twice (two sums per channel; the gradient). Between the passes nothing is kept but
// the rows: what was before the ReLU is worked out again.
//
// Rows are divided into parts in a way that does not depend on the number of threads, and neither do the sums.
#include "norm.h"

#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace sparkme {
Pair batch_statistics(const Tensor &rows) {
  const Tensor rows_ = rows.contiguous();
  TORCH_CHECK_VALUE(rows_.dim() == 2, "rows must be (N, C), got ", rows_.sizes());
  const int64_t channels = rows_.size(1);
  const Parts parts(rows_.size(0));
  Tensor mean = at::zeros({channels}, rows_.options().dtype(sum_type(rows_))), variance = at::zeros_like(mean);
  const Tensor sums = at::empty({parts.count(), 2, channels}, mean.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows_.scalar_type(), "batch_statistics", [&] {
    using S = Sum<scalar_t>;
    const scalar_t *data = rows_.const_data_ptr<scalar_t>();
    S *partial = sums.mutable_data_ptr<S>();
    parts.each([&](int64_t part) {
      kernels_of<scalar_t>().statistics(data + parts.begin(part) * channels, parts.rows(part), channels,
                                        partial + part * 2 * channels);
    });
    // The parts are joined as Chan, Golub and LeVeque (1979) do, in double.
    std::vector<double> means(channels, 0), squares(channels, 0);
    for (int64_t part = 0; part < parts.count(); ++part) {
      const auto before = static_cast<double>(parts.begin(part)), own = static_cast<double>(parts.rows(part));
      const scalar_t *origin = data + parts.begin(part) * channels;
      const S *sum = partial + part * 2 * channels, *square = sum + channels;
      for (int64_t c = 0; c < channels; ++c) {
        const double offset = static_cast<double>(sum[c]) / own, apart = static_cast<double>(origin[c]) + offset - means[c];
        means[c] += apart * own / (before + own);
        squares[c] += static_cast<double>(square[c]) - offset * offset * own + apart * apart * before * own / (before + own);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      mean.mutable_data_ptr<S>()[c] = static_cast<S>(means[c]);
      variance.mutable_data_ptr<S>()[c] =
          static_cast<S>(std::max(0.0, squares[c]) / static_cast<double>(std::max<int64_t>(1, rows_.size(0))));
    }
  });
  return {mean, variance};
}

namespace {

// As at::lerp_, towards `factor` times the value.
template <typename S>
void move(const Optional &running, const Tensor &value, S factor, S momentum) {
  if (!running) return;
  if (running->scalar_type() != value.scalar_type() || !running->is_contiguous()) {
    running->lerp_((value * static_cast<double>(factor)).to(running->scalar_type()), momentum);
    return;
  }
  S *target = running->mutable_data_ptr<S>();
  const S *source = value.const_data_ptr<S>();
  for (int64_t c = 0; c < value.size(0); ++c) target[c] += momentum * (source[c] * factor - target[c]);
}

Pair norm_statistics(const Tensor &rows, double epsilon, const Optional &running_mean, const Optional &running_var,
                     double momentum) {
  const auto [mean, variance] = batch_statistics(rows);
  check_running("running_mean", running_mean, mean);
  check_running("running_var", running_var, mean);
  if (rows.size(0) == 0) return {mean, variance};
  Tensor deviation = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "norm_statistics", [&] {
    const scalar_t *variances = variance.const_data_ptr<scalar_t>();
    scalar_t *deviations = deviation.mutable_data_ptr<scalar_t>();
    for (int64_t c = 0; c < mean.size(0); ++c) deviations[c] = 1 / std::sqrt(variances[c] + static_cast<scalar_t>(epsilon));
    const auto part = static_cast<scalar_t>(momentum);
    move<scalar_t>(running_mean, mean, 1, part);
    move<scalar_t>(running_var, variance, static_cast<scalar_t>(unbiased(rows.size(0))), part);
  });
  return {mean, deviation};
}

Tensor batch_norm(const Tensor &rows, const Tensor &mean, const Tensor &inverse_deviation, const Optional &weight,
                  const Optional &bias, const Optional &factor, const Optional &residual, Number ceiling,
                  bool /*training: whether the statistics are the rows' own, for the gradient*/) {
  const Norm norm(rows, mean, inverse_deviation, weight, bias, factor, ceiling);
  const Optional added = residual ? Optional(residual_of(*residual, norm.rows)) : std::nullopt;
  const Parts parts(norm.rows.size(0));
  Tensor out = at::empty_like(norm.rows);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, out.scalar_type(), "batch_norm", [&] {
    const scalar_t *residual_data = data_or_null<scalar_t>(added);
    scalar_t *target = out.mutable_data_ptr<scalar_t>();
    parts.each([&](int64_t part) {
      const int64_t first = parts.begin(part), at = first * out.size(1);
      kernels_of<scalar_t>().normalise(norm.part<scalar_t>(first, parts.rows(part)),
                                       residual_data ? residual_data + at : nullptr, target + at);
    });
  });
  return out;
}

Pair batch_norm_grad_sums(const Tensor &grad, const Tensor &rows, const Optional &out, const Tensor &mean,
                          const Tensor &inverse_deviation, const Optional &weight, const Optional &bias, const Optional &factor,
                          Number ceiling) {
  const Norm norm(rows, mean, inverse_deviation, weight, bias, factor, ceiling);
  const Tensor grad_ = grad.contiguous();
  check_like("grad", grad_, norm.rows);
  Optional out_;
  if (out) {
    check_like("out", *out, norm.rows);
    out_ = out->contiguous();
  }
  const int64_t channels = grad_.size(1);
  const Parts parts(grad_.size(0));
  const Tensor partial = at::empty({parts.count(), 2, channels}, norm.mean.options());
  Tensor masked = out ? at::empty_like(grad_) : at::empty({0}, grad_.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, grad_.scalar_type(), "batch_norm_grad_sums", [&] {
    const scalar_t *out_data = data_or_null<scalar_t>(out_);
    scalar_t *target = masked.mutable_data_ptr<scalar_t>();
    parts.each([&](int64_t part) {
      const int64_t first = parts.begin(part), at = first * channels;
      kernels_of<scalar_t>().norm_grad_sums(norm.part<scalar_t>(first, parts.rows(part)), grad_.const_data_ptr<scalar_t>() + at,
                                            out_data ? out_data + at : nullptr, norm.mean.const_data_ptr<Sum<scalar_t>>(),
                                            partial.mutable_data_ptr<Sum<scalar_t>>() + part * 2 * channels,
                                            out_data ? target + at : nullptr);
    });
  });
  Tensor sums = partial.sum(0, false, at::kDouble);
  sums.select(0, 1).mul_(norm.deviation);
  return {masked, sums.to(norm.mean.scalar_type())};
}

Tensor batch_norm_grad_rows(const Tensor &grad, const Tensor &rows, const Tensor &mean, const Tensor &inverse_deviation,
                            const Optional &weight, const Optional &bias, const Optional &factor, Number ceiling,
                            const Optional &sums, Number count) {
  const Norm norm(rows, mean, inverse_deviation, weight, bias, factor, ceiling);
  const Tensor grad_ = grad.contiguous();
  check_like("grad", grad_, norm.rows);
  Tensor constant = at::zeros_like(norm.mean), by_row = constant;
  if (sums) {
    TORCH_CHECK_VALUE(sums->dim() == 2 && sums->size(0) == 2 && sums->size(1) == grad_.size(1), "sums must be (2, C), got ",
                      sums->sizes());
    const Tensor means =
        (sums->to(norm.mean.scalar_type()) / -std::max(1.0, count.value_or(static_cast<double>(grad_.size(0)))));
    constant = (means[0] * norm.scale).contiguous();
    by_row = (means[1] * norm.scale * norm.deviation).contiguous();
  }
  const Parts parts(grad_.size(0));
  Tensor grad_rows = at::empty_like(norm.rows);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, grad_.scalar_type(), "batch_norm_grad_rows", [&] {
    using S = Sum<scalar_t>;
    scalar_t *target = grad_rows.mutable_data_ptr<scalar_t>();
    parts.each([&](int64_t part) {
      const int64_t first = parts.begin(part), at = first * grad_.size(1);
      kernels_of<scalar_t>().norm_grad_rows(norm.part<scalar_t>(first, parts.rows(part)), grad_.const_data_ptr<scalar_t>() + at,
                                            norm.mean.const_data_ptr<S>(), norm.scale.const_data_ptr<S>(),
                                            by_row.const_data_ptr<S>(), constant.const_data_ptr<S>(), target + at);
    });
  });
  return grad_rows;
}

Pair layer_norm(const Tensor &rows, const Optional &weight, const Optional &bias, double epsilon) {
  const Tensor rows_ = rows.contiguous();
  TORCH_CHECK_VALUE(rows_.dim() == 2, "rows must be (N, C), got ", rows_.sizes());
  const int64_t channels = rows_.size(1);
  const Tensor scale = per_channel("weight", weight, rows_, 1), shift = per_channel("bias", bias, rows_, 0);
  Tensor out = at::empty_like(rows_), statistics = at::empty({rows_.size(0), 2}, scale.options());
  const Parts parts(rows_.size(0));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows_.scalar_type(), "layer_norm", [&] {
    using S = Sum<scalar_t>;
    const scalar_t *data = rows_.const_data_ptr<scalar_t>();
    scalar_t *target = out.mutable_data_ptr<scalar_t>();
    S *numbers = statistics.mutable_data_ptr<S>();
    parts.each([&](int64_t part) {
      const int64_t first = parts.begin(part);
      kernels_of<scalar_t>().layer_norm(data + first * channels, parts.rows(part), channels, scale.const_data_ptr<S>(),
                                        shift.const_data_ptr<S>(), static_cast<S>(epsilon), target + first * channels,
                                        numbers + 2 * first);
    });
  });
  return {out, statistics};
}

Pair layer_norm_grad(const Tensor &grad, const Tensor &rows, const Tensor &statistics, const Optional &weight) {
  const Tensor rows_ = rows.contiguous(), grad_ = grad.contiguous();
  check_like("grad", grad_, rows_);
  const int64_t channels = rows_.size(1);
  const Tensor scale = per_channel("weight", weight, rows_, 1);
  const Tensor statistics_ = statistics.to(scale.scalar_type()).contiguous();
  TORCH_CHECK_VALUE(statistics_.numel() == 2 * rows_.size(0), "statistics must be (", rows_.size(0), ", 2), got ",
                    statistics.sizes());
  const Parts parts(rows_.size(0));
  Tensor grad_rows = at::empty_like(rows_);
  const Tensor partial = at::empty({parts.count(), 2, channels}, scale.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows_.scalar_type(), "layer_norm_grad", [&] {
    using S = Sum<scalar_t>;
    const scalar_t *data = rows_.const_data_ptr<scalar_t>(), *grads = grad_.const_data_ptr<scalar_t>();
    scalar_t *target = grad_rows.mutable_data_ptr<scalar_t>();
    const S *numbers = statistics_.const_data_ptr<S>();
    S *sums = partial.mutable_data_ptr<S>();
    parts.each([&](int64_t part) {
      const int64_t first = parts.begin(part), at = first * channels;
      kernels_of<scalar_t>().layer_norm_grad(grads + at, data + at, parts.rows(part), channels, scale.const_data_ptr<S>(),
                                             numbers + 2 * first, target + at, sums + part * 2 * channels);
    });
  });
  return {grad_rows, partial.sum(0, false, at::kDouble).to(scale.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, CPU, m) {
  m.impl("layer_norm", layer_norm);
  m.impl("layer_norm_grad", layer_norm_grad);
  m.impl("batch_statistics", batch_statistics);
  m.impl("norm_statistics", norm_statistics);
  m.impl("batch_norm", batch_norm);
  m.impl("batch_norm_grad_sums", batch_norm_grad_sums);
  m.impl("batch_norm_grad_rows", batch_norm_grad_rows);
}

}  // namespace sparkme
