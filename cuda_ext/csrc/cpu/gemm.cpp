#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

namespace sparkme {
namespace {

using LinearPointwise = at::Tensor(const at::Tensor &, const at::Tensor &, const std::optional<at::Tensor> &, std::string_view,
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

// Row after row or column after column: with other strides oneDNN falls back to a loop that is a thousand times slower.
at::Tensor packed(const at::Tensor &matrix) {
  return matrix.is_contiguous() || matrix.t().is_contiguous() ? matrix : matrix.contiguous();
}

}  // namespace

at::Tensor gemm(const at::Tensor &a, const at::Tensor &b, const std::optional<at::Tensor> &bias) {
  const c10::impl::ExcludeDispatchKeyGuard keep_the_type(c10::autocast_dispatch_keyset);
  const bool empty = a.numel() == 0 || b.numel() == 0;
  if (a.scalar_type() == at::kFloat && !empty && at::globalContext().userEnabledMkldnn() && onednn_linear()) {
    return onednn_linear()->call(packed(a), packed(b).t(), bias ? std::optional(bias->contiguous()) : bias, "none",
                                 c10::List<std::optional<at::Scalar>>(), "");
  }
  return bias ? at::addmm(*bias, a, b) : at::mm(a, b);
}

namespace {

at::Tensor linear(const at::Tensor &rows, const at::Tensor &kernel, const std::optional<at::Tensor> &bias) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && kernel.dim() == 2 && rows.size(1) == kernel.size(0), "kernel must be (", rows.size(-1),
                    ", C_out)");
  return gemm(rows, kernel, bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, CPU, m) { m.impl("linear", linear); }

}  // namespace sparkme
