// What the gradients of the families need, for the CPU and CUDA alike.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "checks.h"

// Calls torch.ops.sparkme.NAME, on whatever device. The operator has the type of the CPU's kernel, the function NAME.
#define SPARKME_CALL(NAME, ...)                                                                                               \
  [&] {                                                                                                                       \
    static const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow("sparkme::" #NAME, "").typed<decltype(NAME)>(); \
    return handle.call(__VA_ARGS__);                                                                                          \
  }()

namespace sparkme {
namespace {

using Context = torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

bool differs(const Optional &value) { return value && value->requires_grad(); }

// (N, C) of (..., C). Below autograd it is no view that keeps its base: such a one autograd's sums could not be made in place.
Optional flat(const Optional &value) { return value && value->dim() != 2 ? value->flatten(0, -2) : value; }

Tensor like_residual(Context *ctx, const Tensor &grad) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return grad.view(ctx->saved_data["residual"].toIntVector());
}

// Undefined where there is none, as save_for_backward keeps it; and back.
Tensor kept(const Optional &value) { return value.value_or(Tensor()); }
Optional given(const Tensor &value) { return value.defined() ? Optional(value) : std::nullopt; }

template <typename F, typename... Args>
auto kernel_of(Tensor (*)(Context *, Args...)) {
  return +[](Args... args) -> Tensor { return F::apply(args...); };
}

template <typename F, typename... Args>
auto kernel_of(variable_list (*)(Context *, Args...)) {
  return +[](Args... args) -> Pair {
    const variable_list out = F::apply(args...);
    return {out[0], out[1]};
  };
}

// A kernel that runs F, with the arguments of its forward pass.
template <typename F>
auto differentiable() {
  return kernel_of<F>(&F::forward);
}

// The kernel of an operator that gradients are made of: it has none of its own, and says so when it is asked for one.
auto no_gradient() { return torch::autograd::autogradNotImplementedFallback(); }

}  // namespace
}  // namespace sparkme
