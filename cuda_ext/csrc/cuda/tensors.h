// What the CUDA operators do with torch's tensors: checks, types, and the stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <tuple>

#include "../checks.h"
#include "launch.h"

#if !defined(SPARKME_ON_HOST)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#define SPARKME_LIBRARY sparkme
#define SPARKME_KEY CUDA
#endif

namespace sparkme::cuda {
namespace {

#if !defined(SPARKME_ON_HOST)
constexpr auto kDevice = at::kCUDA;
using DeviceGuard = c10::cuda::CUDAGuard;

Stream current_stream() { return c10::cuda::getCurrentCUDAStream(); }

int32_t multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}
#else
constexpr auto kDevice = at::kCPU;
using DeviceGuard = on_host::DeviceGuard;

Stream current_stream() { return {}; }
int32_t multiprocessors() { return on_host::kMultiprocessors; }
#endif

// Makes everything that follows happen on the device of `first`, where the others have to be as well.
template <typename... Tensors>
DeviceGuard on_device_of(const Tensor &first, const Tensors &...others) {
  TORCH_CHECK_VALUE(first.device().type() == kDevice, "expected a tensor on ", kDevice, ", got ", first.device());
  TORCH_CHECK_VALUE(((others.device() == first.device()) && ...), "all tensors must be on ", first.device());
  return DeviceGuard(first.device());
}

template <typename... Tensors>
void check_types(const Tensor &first, const Tensors &...others) {
  TORCH_CHECK_VALUE(((others.scalar_type() == first.scalar_type()) && ...), "all rows and kernels must be ",
                    first.scalar_type());
}

// Calls f(T()) for the element type.
template <typename F>
void with_type(at::ScalarType type, F f) {
  switch (type) {
    case at::kDouble:
      return f(double());
    case at::kFloat:
      return f(float());
    case at::kBFloat16:
      return f(c10::BFloat16());
    default:
      TORCH_CHECK_VALUE(false, "rows must be float64, float32 or bfloat16, got ", type);
  }
}

// Calls f(T(), std::integral_constant<int, V>()), unless there are no rows (..., C), the first of `tensors`: T is their type,
// and V how many channels an access takes. That is as many as one instruction can, where it divides C and all addresses, else
// one.
template <typename F>
void with_width(std::initializer_list<Tensor> tensors, const F &f) {
  const Tensor &rows = *tensors.begin();
  with_type(rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (rows.numel() == 0) return;
    const bool wide = std::all_of(tensors.begin(), tensors.end(), [&](const Tensor &value) {
      return !value.defined() || fits_widest<T>(rows.size(-1), value.const_data_ptr());
    });
    if (wide) {
      f(zero, std::integral_constant<int, kWidest<T>>());
    } else {
      f(zero, std::integral_constant<int, 1>());
    }
  });
}

template <typename T>
const T *data_or_null(const Tensor &value) {
  return value.defined() ? value.const_data_ptr<T>() : nullptr;
}

int32_t channels_of(const Tensor &rows) { return static_cast<int32_t>(rows.size(1)); }

void check_table(const char *name, const Tensor &table) {
  TORCH_CHECK_VALUE(table.scalar_type() == at::kInt && table.dim() == 2, name, " must be (N, K) int32");
}

// Tensors are made contiguous by the caller, and kept by it while `Geometry` points into them.
Geometry geometry_of(const Tensor &slots, const Tensor &patches, int64_t pixels, Sizes kernel_size, int64_t stride,
                     int64_t dilation) {
  const Sites sites = sites_of(slots, patches);
  const Window window = window_of(kernel_size, stride, dilation);
  TORCH_CHECK_VALUE(window.height > 0 && window.width > 0 && dilation > 0, "kernel_size and dilation must be positive");
  TORCH_CHECK_VALUE(pixels > 0 && stride > 0 && pixels % stride == 0, "stride ", stride, " must divide pixels=", pixels);
  TORCH_CHECK_VALUE(patches.size(0) * pixels * pixels <= std::numeric_limits<int32_t>::max(), patches.size(0), " patches of ",
                    pixels, "^2 pixels are more than 32 bits can number");
  return {sites, window, patches.size(0), static_cast<int32_t>(pixels), multiprocessors()};
}

}  // namespace
}  // namespace sparkme::cuda
