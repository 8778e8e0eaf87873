#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

#include "kernels.h"
#include "products.h"

namespace sparkme {
namespace {

using LinearPointwise = Tensor(const Tensor &, const Tensor &, const Optional &, std::string_view,
                               c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

// torch's own door to oneDNN's inner product; absent where torch was built without it.
const std::optional<c10::TypedOperatorHandle<LinearPointwise>> &onednn_linear() {
  static const auto handle = []() -> std::optional<c10::TypedOperatorHandle<LinearPointwise>> {
    auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!found || !found->hasKernelForDispatchKey(c10::DispatchKey::CPU)) return std::nullopt;
    return found->typed<LinearPointwise>();
  }();
  return handle;
}

Tensor row_major(const Tensor &matrix) { return matrix.stride(0) == 1 ? transposed(matrix.t()) : matrix.contiguous(); }

// Row after row or column after column: with other strides oneDNN falls back to a loop that is a thousand times slower.
Tensor packed(const Tensor &matrix) {
  return matrix.is_contiguous() || matrix.t().is_contiguous() ? matrix : matrix.contiguous();
}

constexpr int64_t kLines = 16;  // rows that one thread transposes at least

}  // namespace

Tensor transposed(const Tensor &matrices) {
  const Tensor matrices_ = matrices.contiguous();
  const int64_t height = matrices_.size(-2), width = matrices_.size(-1), area = height * width;
  Tensor out = at::empty_like(matrices_.transpose(-2, -1), at::MemoryFormat::Contiguous);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, matrices_.scalar_type(), "transposed", [&] {
    const scalar_t *source = matrices_.const_data_ptr<scalar_t>();
    scalar_t *target = out.mutable_data_ptr<scalar_t>();
    const int64_t strips = (height + kLines - 1) / kLines, count = area == 0 ? 0 : matrices_.numel() / area;
    at::parallel_for(0, count * strips, std::max<int64_t>(1, 32768 / (kLines * width + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t matrix = i / strips * area, first = i % strips * kLines;
        kernels_of<scalar_t>().transpose(source + matrix + first * width, width, std::min(kLines, height - first), width,
                                         target + matrix + first, height);
      }
    });
  });
  return out;
}

Tensor gemm(const Tensor &a, const Tensor &b, const Optional &bias) {
  const c10::impl::ExcludeDispatchKeyGuard keep_the_type(c10::autocast_dispatch_keyset);
  const bool empty = a.numel() == 0 || b.numel() == 0;
  if (a.scalar_type() == at::kFloat && !empty && !bias && a.stride(0) == 1 && a.t().is_contiguous() && b.is_contiguous())
    return outer_product(a.t(), b);
  if (a.scalar_type() == at::kFloat && !empty && at::globalContext().userEnabledMkldnn() && onednn_linear()) {
    return onednn_linear()->call(row_major(a), packed(b).t(), bias ? std::optional(bias->contiguous()) : bias, "none",
                                 c10::List<std::optional<at::Scalar>>(), "");
  }
  return bias ? at::addmm(*bias, a, b) : at::mm(a, b);
}

}  // namespace sparkme
