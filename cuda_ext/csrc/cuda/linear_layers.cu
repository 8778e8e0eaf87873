// Linear layers: a product is torch's, and what is fused with one on the CPU is left to other operators.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "tensors.h"

namespace sparkme::cuda {
namespace {

Tensor linear(const Tensor &rows, const Tensor &kernel, const Optional &bias) {
  const c10::impl::ExcludeDispatchKeyGuard keep_the_type(c10::autocast_dispatch_keyset);
  return bias ? at::addmm(*bias, rows, kernel) : at::mm(rows, kernel);
}

}  // namespace

TORCH_LIBRARY_IMPL(SPARKME_LIBRARY, SPARKME_KEY, m) { m.impl("linear", linear); }

}  // namespace sparkme::cuda
