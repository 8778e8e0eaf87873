// What the batch norms read, and how they divide rows among threads.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "../checks.h"
#include "gemm.h"
#include "kernels.h"

namespace sparkme {

// Parts of at most 1024 rows, so that a sum in float32 stays exact enough, and of at least 64.
class Parts {
 public:
  explicit Parts(int64_t num_rows) : num_rows_(num_rows), size_(std::clamp<int64_t>((num_rows + 15) / 16, 64, 1024)) {}

  int64_t count() const { return (num_rows_ + size_ - 1) / size_; }
  int64_t begin(int64_t part) const { return part * size_; }
  int64_t rows(int64_t part) const { return std::min(size_, num_rows_ - part * size_); }

  // body(part) for all parts, in parallel.
  template <typename Body>
  void each(const Body &body) const {
    at::parallel_for(0, count(), 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) body(part);
    });
  }

 private:
  int64_t num_rows_, size_;
};

// A number per channel in the type of sums; `otherwise` where there is none.
inline Tensor per_channel(const char *name, const Optional &value, const Tensor &rows, double otherwise) {
  if (!value) return at::zeros({rows.size(1)}, rows.options().dtype(sum_type(rows))).fill_(otherwise);
  TORCH_CHECK_VALUE(value->dim() == 1 && value->size(0) == rows.size(1), name, " must be (", rows.size(1), ",), got ",
                    value->sizes());
  return value->to(sum_type(rows)).contiguous();
}

// The factor of every row, from that of every sample.
inline Optional per_row(const Optional &factor, const Tensor &rows) {
  if (!factor) return std::nullopt;
  TORCH_CHECK_VALUE(factor->dim() == 1 && factor->size(0) > 0 && rows.size(0) % factor->size(0) == 0, "factor ",
                    factor->sizes(), " must be one number for each sample of ", rows.size(0), " rows");
  return factor->to(sum_type(rows))
      .view({-1, 1})
      .expand({factor->size(0), rows.size(0) / factor->size(0)})
      .reshape({-1})
      .contiguous();
}

template <typename T>
T *data_or_null(const Optional &value) {
  return value ? const_cast<T *>(value->const_data_ptr<T>()) : nullptr;
}

// As what is clamped can hold it, so that a clamped number is equal to it.
template <typename T>
Sum<T> ceiling_in(double ceiling) {
  return static_cast<Sum<T>>(static_cast<T>(ceiling));
}

// What the kernels read, and whose memory it is.
struct Norm {
  Tensor rows, mean, deviation, weight, scale, shift;
  Optional factors;
  double ceiling;  // NaN for none

  Norm(const Tensor &rows_, const Tensor &mean_, const Tensor &inverse_deviation, const Optional &weight_, const Optional &bias,
       const Optional &factor, Number ceiling_)
      : rows(rows_.contiguous()), ceiling(ceiling_or_nan(ceiling_)) {
    TORCH_CHECK_VALUE(rows.dim() == 2, "rows must be (N, C), got ", rows.sizes());
    mean = per_channel("mean", mean_, rows, 0);
    deviation = per_channel("inverse_deviation", inverse_deviation, rows, 1);
    weight = per_channel("weight", weight_, rows, 1);
    const Tensor offset = per_channel("bias", bias, rows, 0);
    scale = at::empty_like(mean);
    shift = at::empty_like(mean);
    AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "batch_norm", [&] {  // one loop instead of several operators
      const scalar_t *means = mean.const_data_ptr<scalar_t>(), *offsets = offset.const_data_ptr<scalar_t>();
      const scalar_t *weights = weight.const_data_ptr<scalar_t>(), *deviations = deviation.const_data_ptr<scalar_t>();
      scalar_t *scales = scale.mutable_data_ptr<scalar_t>(), *shifts = shift.mutable_data_ptr<scalar_t>();
      for (int64_t c = 0; c < rows.size(1); ++c) {
        scales[c] = weights[c] * deviations[c];
        shifts[c] = offsets[c] - means[c] * scales[c];
      }
    });
    factors = per_row(factor, rows);
  }

  template <typename T>
  NormRows<T> part(int64_t first, int64_t count) const {
    const int64_t channels = rows.size(1);
    return {rows.const_data_ptr<T>() + first * channels,
            count,
            channels,
            scale.const_data_ptr<Sum<T>>(),
            shift.const_data_ptr<Sum<T>>(),
            factors ? factors->const_data_ptr<Sum<T>>() + first : nullptr,
            ceiling_in<T>(ceiling)};
  }
};

// Mean and (biased) variance of each channel.
Pair batch_statistics(const Tensor &rows);

}  // namespace sparkme
