// What a kernel needs to be true so that it stays within its arrays. The wrappers in sparkme/ops check the same and more, with
// better words.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "geometry.h"

namespace sparkme {

inline void check_int32(const char *name, const at::Tensor &value, int64_t dims) {
  TORCH_CHECK_VALUE(value.scalar_type() == at::kInt && value.dim() == dims && value.is_contiguous(), name,
                    " must be contiguous int32 with ", dims, " dimensions");
}

inline void check_rows(const char *name, const at::Tensor &value, int64_t num_rows) {
  TORCH_CHECK_VALUE(value.dim() == 2 && value.size(0) == num_rows, name, " must be (", num_rows, ", C), got ", value.sizes());
}

inline Sites sites_of(const at::Tensor &slots, const at::Tensor &patches) {
  check_int32("slots", slots, 3);
  check_int32("patches", patches, 1);
  return {slots.const_data_ptr<int32_t>(), patches.const_data_ptr<int32_t>(), static_cast<int32_t>(slots.size(1)),
          static_cast<int32_t>(slots.size(2))};
}

inline Window window_of(at::IntArrayRef kernel_size, int64_t stride, int64_t dilation) {
  TORCH_CHECK_VALUE(kernel_size.size() == 2 && kernel_size[0] > 0 && kernel_size[1] > 0,
                    "kernel_size must be two positive numbers");
  TORCH_CHECK_VALUE(stride > 0 && dilation > 0, "stride ", stride, " and dilation ", dilation, " must be positive");
  return {static_cast<int32_t>(kernel_size[0]), static_cast<int32_t>(kernel_size[1]), static_cast<int32_t>(stride),
          static_cast<int32_t>(dilation)};
}

}  // namespace sparkme
