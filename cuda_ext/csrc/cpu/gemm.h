#pragma once

#include "../checks.h"

namespace sparkme {

// (N, K) times (K, M), of any strides, plus a bias (M). In float32 through oneDNN, which torch itself does not take for a plain
// product: MKL reaches less than half of oneDNN's speed on processors that are not Intel's.
Tensor gemm(const Tensor &a, const Tensor &b, const Optional &bias = std::nullopt);

// The last two axes changed over, contiguous.
Tensor transposed(const Tensor &matrices);

}  // namespace sparkme
