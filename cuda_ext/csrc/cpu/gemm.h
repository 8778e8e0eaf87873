#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace sparkme {

// (N, K) times (K, M), of any strides, plus a bias (M). In float32 through oneDNN, which torch itself does not take for a plain
// product: MKL reaches less than half of oneDNN's speed on processors that are not Intel's.
at::Tensor gemm(const at::Tensor &a, const at::Tensor &b, const std::optional<at::Tensor> &bias = std::nullopt);

// In which sums over rows are made, and numbers per channel kept.
inline at::ScalarType sum_type(const at::Tensor &rows) { return rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The last two axes changed over, contiguous.
at::Tensor transposed(const at::Tensor &matrices);

}  // namespace sparkme
