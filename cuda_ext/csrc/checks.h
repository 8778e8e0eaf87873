// What a kernel needs to be true so that it stays within its arrays. The wrappers in sparkme/ops check the same and more, with
// better words.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <optional>
#include <tuple>

#include "geometry.h"

namespace sparkme {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Number = std::optional<double>;
using Pair = std::tuple<Tensor, Tensor>;
using Sizes = at::IntArrayRef;

inline void check_int32(const char *name, const Tensor &value, int64_t dims) {
  TORCH_CHECK_VALUE(value.scalar_type() == at::kInt && value.dim() == dims && value.is_contiguous(), name,
                    " must be contiguous int32 with ", dims, " dimensions");
}

inline void check_rows(const char *name, const Tensor &value, int64_t num_rows) {
  TORCH_CHECK_VALUE(value.dim() == 2 && value.size(0) == num_rows, name, " must be (", num_rows, ", C), got ", value.sizes());
}

inline Sites sites_of(const Tensor &slots, const Tensor &patches) {
  check_int32("slots", slots, 3);
  check_int32("patches", patches, 1);
  return {slots.const_data_ptr<int32_t>(), patches.const_data_ptr<int32_t>(), static_cast<int32_t>(slots.size(1)),
          static_cast<int32_t>(slots.size(2))};
}

inline Window window_of(Sizes kernel_size, int64_t stride, int64_t dilation) {
  TORCH_CHECK_VALUE(kernel_size.size() == 2 && kernel_size[0] > 0 && kernel_size[1] > 0,
                    "kernel_size must be two positive numbers");
  TORCH_CHECK_VALUE(stride > 0 && dilation > 0, "stride ", stride, " and dilation ", dilation, " must be positive");
  return {static_cast<int32_t>(kernel_size[0]), static_cast<int32_t>(kernel_size[1]), static_cast<int32_t>(stride),
          static_cast<int32_t>(dilation)};
}

// In which sums over rows are made, and numbers per channel kept.
inline at::ScalarType sum_type(const Tensor &rows) { return rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// What is added to rows (N, C), in their shape.
inline Tensor residual_of(const Tensor &residual, const Tensor &rows) {
  TORCH_CHECK_VALUE(residual.numel() == rows.numel() && residual.dim() > 0 && residual.size(-1) == rows.size(1) &&
                        residual.scalar_type() == rows.scalar_type(),
                    "residual must be like rows, ", rows.sizes(), ", got ", residual.sizes());
  return residual.reshape(rows.sizes()).contiguous();
}

inline void check_running(const char *name, const Optional &value, const Tensor &mean) {
  TORCH_CHECK_VALUE(!value || (value->sizes() == mean.sizes() && value->device() == mean.device()), name, " must be ",
                    mean.sizes(), " on ", mean.device(), ", got ", value->sizes(), " on ", value->device());
}

// Times the variance of so many rows, that of what they are a sample of.
inline double unbiased(int64_t count) { return static_cast<double>(count) / static_cast<double>(count > 1 ? count - 1 : 1); }

inline void check_like(const char *name, const Tensor &value, const Tensor &rows) {
  TORCH_CHECK_VALUE(value.sizes() == rows.sizes() && value.scalar_type() == rows.scalar_type(), name, " must be like rows, ",
                    rows.sizes(), ", got ", value.sizes());
}

inline double ceiling_or_nan(Number ceiling) {
  TORCH_CHECK_VALUE(!ceiling || *ceiling > 0, "ceiling must be positive, got ", *ceiling);
  return ceiling.value_or(std::numeric_limits<double>::quiet_NaN());
}

}  // namespace sparkme
