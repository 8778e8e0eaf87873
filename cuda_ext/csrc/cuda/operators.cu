// The CUDA operators as torch calls them: checks, memory, and the stream. The kernels are in the other files.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "operators.h"

#if !defined(SPARKME_ON_HOST)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#define SPARKME_LIBRARY sparkme
#define SPARKME_KEY CUDA
#endif

namespace sparkme {
namespace {

using cuda::Geometry;

#if !defined(SPARKME_ON_HOST)
constexpr auto kDevice = at::kCUDA;
using DeviceGuard = c10::cuda::CUDAGuard;

cuda::Stream current_stream() { return c10::cuda::getCurrentCUDAStream(); }

int32_t multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}
#else
constexpr auto kDevice = at::kCPU;
using DeviceGuard = on_host::DeviceGuard;

cuda::Stream current_stream() { return {}; }
int32_t multiprocessors() { return on_host::kMultiprocessors; }
#endif

// Makes everything that follows happen on the device of `first`, where the others have to be as well.
template <typename... Tensors>
DeviceGuard on_device_of(const at::Tensor &first, const Tensors &...others) {
  TORCH_CHECK_VALUE(first.device().type() == kDevice, "expected a tensor on ", kDevice, ", got ", first.device());
  TORCH_CHECK_VALUE(((others.device() == first.device()) && ...), "all tensors must be on ", first.device());
  return DeviceGuard(first.device());
}

template <typename... Tensors>
void check_types(const at::Tensor &first, const Tensors &...others) {
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

int32_t channels_of(const at::Tensor &rows) { return static_cast<int32_t>(rows.size(1)); }

void check_table(const char *name, const at::Tensor &table) {
  TORCH_CHECK_VALUE(table.scalar_type() == at::kInt && table.dim() == 2, name, " must be (N, K) int32");
}

// Tensors are made contiguous by the caller, and kept by it while `Geometry` points into them.
Geometry geometry_of(const at::Tensor &slots, const at::Tensor &patches, int64_t pixels, at::IntArrayRef kernel_size,
                     int64_t stride, int64_t dilation) {
  const Sites sites = sites_of(slots, patches);
  const Window window = window_of(kernel_size, stride, dilation);
  TORCH_CHECK_VALUE(window.height > 0 && window.width > 0 && dilation > 0, "kernel_size and dilation must be positive");
  TORCH_CHECK_VALUE(pixels > 0 && stride > 0 && pixels % stride == 0, "stride ", stride, " must divide pixels=", pixels);
  TORCH_CHECK_VALUE(patches.size(0) * pixels * pixels <= std::numeric_limits<int32_t>::max(), patches.size(0), " patches of ",
                    pixels, "^2 pixels are more than 32 bits can number");
  return {sites, window, patches.size(0), static_cast<int32_t>(pixels), multiprocessors()};
}

// Memory of the device for a kernel's partial results. It is given back when the operator returns, which is sound: the
// allocator hands it on in the order of the stream.
class Workspace {
 public:
  explicit Workspace(const at::Tensor &like) : options_(like.options().dtype(at::kByte)) {}

  cuda::Allocate allocate() {
    return [this](int64_t bytes) {
      memory_ = at::empty({bytes}, options_);
      return memory_.mutable_data_ptr();
    };
  }

 private:
  at::TensorOptions options_;
  at::Tensor memory_;
};

at::Tensor neighbour_table(const at::Tensor &slots, const at::Tensor &patches, int64_t pixels, at::IntArrayRef kernel_size,
                           int64_t stride, int64_t dilation, bool transposed) {
  const auto guard = on_device_of(slots, patches);
  const at::Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, kernel_size, stride, dilation);
  const int64_t side = transposed ? pixels : pixels / stride;
  at::Tensor table = at::empty({geometry.patches * side * side, geometry.window.taps()}, slots_.options());
  cuda::neighbour_table(table.mutable_data_ptr<int32_t>(), geometry, transposed, current_stream());
  return table;
}

at::Tensor convolve_depthwise(const at::Tensor &rows, const at::Tensor &kernel, const Optional &bias, const at::Tensor &slots,
                              const at::Tensor &patches, int64_t pixels, at::IntArrayRef kernel_size, int64_t stride,
                              int64_t dilation, bool transposed) {
  const auto guard = on_device_of(rows, kernel, slots, patches);
  check_types(rows, kernel);
  const at::Tensor rows_ = rows.contiguous(), kernel_ = kernel.contiguous();
  const at::Tensor bias_ = bias ? bias->contiguous() : at::Tensor();
  if (bias) {
    check_types(rows, *bias);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == rows.size(1), "bias must be (", rows.size(1), ",)");
    TORCH_CHECK_VALUE(bias->device() == rows.device(), "bias must be on ", rows.device());
  }
  const at::Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, kernel_size, stride, dilation);
  const Window &window = geometry.window;
  TORCH_CHECK_VALUE(window.height % 2 && window.width % 2, "kernel_size must be odd");
  const int64_t side = pixels / stride, inputs = geometry.patches * pixels * pixels, outputs = geometry.patches * side * side;
  check_rows(transposed ? "grad" : "rows", rows_, transposed ? outputs : inputs);
  check_rows("kernel", kernel_, window.taps());
  TORCH_CHECK_VALUE(kernel_.size(1) == rows_.size(1), "kernel must have ", rows_.size(1), " channels, got ", kernel_.size(1));
  at::Tensor out = at::empty({transposed ? inputs : outputs, rows_.size(1)}, rows_.options());
  with_type(rows_.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::depthwise_conv<T>(out.mutable_data_ptr<T>(), rows_.const_data_ptr<T>(), kernel_.const_data_ptr<T>(),
                            bias ? bias_.const_data_ptr<T>() : nullptr, geometry, channels_of(rows_), transposed,
                            current_stream());
  });
  return out;
}

at::Tensor depthwise_conv(const at::Tensor &rows, const at::Tensor &kernel, const Optional &bias, const at::Tensor &slots,
                          const at::Tensor &patches, int64_t pixels, at::IntArrayRef kernel_size, int64_t stride,
                          int64_t dilation) {
  return convolve_depthwise(rows, kernel, bias, slots, patches, pixels, kernel_size, stride, dilation, false);
}

at::Tensor depthwise_conv_grad_rows(const at::Tensor &grad, const at::Tensor &kernel, const at::Tensor &slots,
                                    const at::Tensor &patches, int64_t pixels, at::IntArrayRef kernel_size, int64_t stride,
                                    int64_t dilation) {
  return convolve_depthwise(grad, kernel, std::nullopt, slots, patches, pixels, kernel_size, stride, dilation, true);
}

at::Tensor depthwise_conv_grad_kernel(const at::Tensor &rows, const at::Tensor &grad, const at::Tensor &slots,
                                      const at::Tensor &patches, int64_t pixels, at::IntArrayRef kernel_size, int64_t stride,
                                      int64_t dilation) {
  const auto guard = on_device_of(rows, grad, slots, patches);
  check_types(rows, grad);
  const at::Tensor rows_ = rows.contiguous(), grad_ = grad.contiguous();
  const at::Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, kernel_size, stride, dilation);
  const int64_t side = pixels / stride;
  TORCH_CHECK_VALUE(geometry.window.height % 2 && geometry.window.width % 2, "kernel_size must be odd");
  check_rows("rows", rows_, geometry.patches * pixels * pixels);
  check_rows("grad", grad_, geometry.patches * side * side);
  TORCH_CHECK_VALUE(grad_.size(1) == rows_.size(1), "grad must have ", rows_.size(1), " channels, got ", grad_.size(1));
  at::Tensor out = at::empty({geometry.window.taps(), rows_.size(1)}, rows_.options());
  Workspace workspace(rows_);
  with_type(rows_.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::depthwise_conv_grad_kernel<T>(out.mutable_data_ptr<T>(), rows_.const_data_ptr<T>(), grad_.const_data_ptr<T>(),
                                        geometry, channels_of(rows_), workspace.allocate(), current_stream());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> max_pool(const at::Tensor &rows, const at::Tensor &table, const at::Tensor &inverse) {
  const auto guard = on_device_of(rows, table);
  const at::Tensor rows_ = rows.contiguous(), table_ = table.contiguous();
  check_rows("rows", rows_, rows_.size(0));
  check_table("table", table_);
  TORCH_CHECK_VALUE(table_.size(1) <= 255, "table has ", table_.size(1), " taps, at most 255 can be pooled");
  at::Tensor out = at::empty({table_.size(0), rows_.size(1)}, rows_.options());
  at::Tensor taken = at::empty(out.sizes(), rows_.options().dtype(at::kByte));
  with_type(rows_.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::max_pool<T>(out.mutable_data_ptr<T>(), taken.mutable_data_ptr<uint8_t>(), rows_.const_data_ptr<T>(),
                      table_.const_data_ptr<int32_t>(), table_.size(0), static_cast<int32_t>(table_.size(1)),
                      channels_of(rows_), current_stream());
  });
  return {out, taken};
}

at::Tensor max_pool_grad_rows(const at::Tensor &grad, const at::Tensor &taken, const at::Tensor &inverse) {
  const auto guard = on_device_of(grad, taken, inverse);
  const at::Tensor grad_ = grad.contiguous(), taken_ = taken.contiguous(), inverse_ = inverse.contiguous();
  check_rows("grad", grad_, grad_.size(0));
  check_table("inverse", inverse_);
  TORCH_CHECK_VALUE(taken_.scalar_type() == at::kByte && taken_.sizes() == grad_.sizes(), "taken must be uint8 of ",
                    grad_.sizes(), ", got ", taken_.scalar_type(), " ", taken_.sizes());
  at::Tensor out = at::empty({inverse_.size(0), grad_.size(1)}, grad_.options());
  with_type(grad_.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::max_pool_grad_rows<T>(out.mutable_data_ptr<T>(), grad_.const_data_ptr<T>(), taken_.const_data_ptr<uint8_t>(),
                                inverse_.const_data_ptr<int32_t>(), inverse_.size(0), static_cast<int32_t>(inverse_.size(1)),
                                channels_of(grad_), current_stream());
  });
  return out;
}

at::Tensor avg_pool(const at::Tensor &rows, const at::Tensor &table, const at::Tensor &inverse) {
  const auto guard = on_device_of(rows, table);
  const at::Tensor rows_ = rows.contiguous(), table_ = table.contiguous();
  check_rows("rows", rows_, rows_.size(0));
  check_table("table", table_);
  at::Tensor out = at::empty({table_.size(0), rows_.size(1)}, rows_.options());
  with_type(rows_.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::avg_pool<T>(out.mutable_data_ptr<T>(), rows_.const_data_ptr<T>(), table_.const_data_ptr<int32_t>(), table_.size(0),
                      static_cast<int32_t>(table_.size(1)), channels_of(rows_), current_stream());
  });
  return out;
}

at::Tensor voxelise(const at::Tensor &dense, const at::Tensor &slots, const at::Tensor &patches, int64_t pixels) {
  const auto guard = on_device_of(dense, slots, patches);
  const at::Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, {1, 1}, 1, 1);
  const Sites &sites = geometry.sites;
  TORCH_CHECK_VALUE(dense.dim() == 4 && dense.size(0) == slots_.size(0) && dense.size(2) == sites.f_h * pixels &&
                        dense.size(3) == sites.f_w * pixels,
                    "dense ", dense.sizes(), " does not fit slots ", slots_.sizes(), " of pixels=", pixels);
  at::Tensor rows = at::empty({geometry.patches * pixels * pixels, dense.size(1)}, dense.options());
  with_type(dense.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    // With one channel its stride is of no account, and copying pixels as they are is the faster way.
    const cuda::Dense<const T> map = {dense.const_data_ptr<T>(), dense.stride(0), dense.size(1) == 1 ? 1 : dense.stride(1),
                                      dense.stride(2), dense.stride(3)};
    cuda::voxelise<T>(rows.mutable_data_ptr<T>(), map, sites, geometry.patches, geometry.pixels, channels_of(dense),
                      current_stream());
  });
  return rows;
}

at::Tensor densify(const at::Tensor &rows, const at::Tensor &slots, const at::Tensor &patches, int64_t pixels,
                   const Optional &fill) {
  const auto guard = on_device_of(rows, slots, patches);
  const at::Tensor rows_ = rows.contiguous(), slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, {1, 1}, 1, 1);
  const Sites &sites = geometry.sites;
  check_rows("rows", rows_, geometry.patches * pixels * pixels);
  at::Tensor background;
  if (fill) {
    TORCH_CHECK_VALUE(fill->dim() == 1 && fill->size(0) == rows_.size(1) && fill->device() == rows_.device(), "fill must be (",
                      rows_.size(1), ",) on ", rows_.device(), ", got ", fill->sizes(), " on ", fill->device());
    background = fill->to(rows_.scalar_type()).contiguous();
  }
  at::Tensor dense = at::empty({slots_.size(0), sites.f_h * pixels, sites.f_w * pixels, rows_.size(1)}, rows_.options());
  with_type(rows_.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::densify<T>(dense.mutable_data_ptr<T>(), rows_.const_data_ptr<T>(), fill ? background.const_data_ptr<T>() : nullptr,
                     sites, slots_.size(0), geometry.pixels, channels_of(rows_), current_stream());
  });
  return dense.permute({0, 3, 1, 2});
}

// A number per channel, or per sample, in the type of sums; undefined where there is none.
at::Tensor numbers(const char *name, const Optional &value, int64_t size, const at::Tensor &rows) {
  if (!value) return {};
  TORCH_CHECK_VALUE(value->dim() == 1 && value->size(0) == size, name, " must be (", size, ",), got ", value->sizes());
  TORCH_CHECK_VALUE(value->device() == rows.device(), name, " must be on ", rows.device(), ", got ", value->device());
  return value->to(sum_type(rows)).contiguous();
}

template <typename T>
const T *data_or_null(const at::Tensor &value) {
  return value.defined() ? value.const_data_ptr<T>() : nullptr;
}

// What the kernels of a batch norm read, and whose memory it is.
struct Norm {
  at::Tensor rows, mean, deviation, weight, bias, factors;
  double ceiling;

  Norm(const at::Tensor &rows_, const at::Tensor &mean_, const at::Tensor &inverse_deviation, const Optional &weight_,
       const Optional &bias_, const Optional &factor, std::optional<double> ceiling_)
      : rows(rows_.contiguous()), ceiling(ceiling_or_nan(ceiling_)) {
    check_rows("rows", rows, rows.size(0));
    TORCH_CHECK_VALUE(rows.size(0) <= std::numeric_limits<int32_t>::max(), rows.size(0),
                      " rows are more than 32 bits can number");
    const int64_t channels = rows.size(1);
    mean = numbers("mean", mean_, channels, rows);
    deviation = numbers("inverse_deviation", inverse_deviation, channels, rows);
    weight = numbers("weight", weight_, channels, rows);
    bias = numbers("bias", bias_, channels, rows);
    if (factor) {
      TORCH_CHECK_VALUE(factor->dim() == 1 && factor->size(0) > 0 && rows.size(0) % factor->size(0) == 0, "factor ",
                        factor->sizes(), " must be one number for each sample of ", rows.size(0), " rows");
      factors = numbers("factor", factor, factor->size(0), rows);
    }
  }

  template <typename T>
  cuda::Norm<T> on_device() const {
    using S = cuda::Sum<T>;
    const int64_t samples = factors.defined() ? factors.size(0) : 1;
    return {rows.const_data_ptr<T>(),
            rows.size(0),
            channels_of(rows),
            mean.const_data_ptr<S>(),
            deviation.const_data_ptr<S>(),
            data_or_null<S>(weight),
            data_or_null<S>(bias),
            data_or_null<S>(factors),
            static_cast<int32_t>(rows.size(0) / samples),
            static_cast<S>(static_cast<T>(ceiling))};  // as what is clamped can hold it
  }
};

// `finish(statistics)` says what else than the mean is wanted.
template <typename Finish>
at::Tensor statistics_of(const at::Tensor &rows, const Finish &finish) {
  const at::Tensor rows_ = rows.contiguous();
  at::Tensor mean = at::empty({rows_.size(1)}, rows_.options().dtype(sum_type(rows_)));
  Workspace workspace(rows_);
  with_type(rows_.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using S = cuda::Sum<T>;
    cuda::Statistics<S> statistics = {};
    statistics.mean = mean.mutable_data_ptr<S>();
    finish(statistics);
    cuda::batch_statistics<T>(statistics, rows_.const_data_ptr<T>(), rows_.size(0), channels_of(rows_), multiprocessors(),
                              workspace.allocate(), current_stream());
  });
  return mean;
}

// Two numbers per channel, for the statistics of no rows.
std::tuple<at::Tensor, at::Tensor> zeros_of(const at::Tensor &rows) {
  const auto options = rows.options().dtype(sum_type(rows));
  return {at::zeros({rows.size(1)}, options), at::zeros({rows.size(1)}, options)};
}

std::tuple<at::Tensor, at::Tensor> batch_statistics(const at::Tensor &rows) {
  const auto guard = on_device_of(rows);
  check_rows("rows", rows, rows.size(0));
  if (rows.size(0) == 0) return zeros_of(rows);
  at::Tensor variance = at::empty({rows.size(1)}, rows.options().dtype(sum_type(rows)));
  at::Tensor mean = statistics_of(rows, [&](auto &statistics) {
    using S = std::remove_pointer_t<decltype(statistics.mean)>;
    statistics.variance = variance.mutable_data_ptr<S>();
  });
  return {mean, variance};
}

std::tuple<at::Tensor, at::Tensor> norm_statistics(const at::Tensor &rows, double epsilon, const Optional &running_mean,
                                                   const Optional &running_var, double momentum) {
  const auto guard = on_device_of(rows);
  check_rows("rows", rows, rows.size(0));
  if (rows.size(0) == 0) return zeros_of(rows);
  const auto type = sum_type(rows);
  at::Tensor deviation = at::empty({rows.size(1)}, rows.options().dtype(type));
  check_running("running_mean", running_mean, deviation);
  check_running("running_var", running_var, deviation);
  // Those of another type, as of float64 weights under autocast, are copied there and back.
  at::Tensor own_mean = running_mean ? running_mean->to(type).contiguous() : at::Tensor();
  at::Tensor own_var = running_var ? running_var->to(type).contiguous() : at::Tensor();
  at::Tensor mean = statistics_of(rows, [&](auto &statistics) {
    using S = std::remove_pointer_t<decltype(statistics.mean)>;
    statistics.deviation = deviation.mutable_data_ptr<S>();
    statistics.running_mean = running_mean ? own_mean.mutable_data_ptr<S>() : nullptr;
    statistics.running_var = running_var ? own_var.mutable_data_ptr<S>() : nullptr;
    statistics.epsilon = static_cast<S>(epsilon);
    statistics.unbiased = static_cast<S>(unbiased(rows.size(0)));
    statistics.momentum = static_cast<S>(momentum);
  });
  if (running_mean && !own_mean.is_same(*running_mean)) running_mean->copy_(own_mean);
  if (running_var && !own_var.is_same(*running_var)) running_var->copy_(own_var);
  return {mean, deviation};
}

at::Tensor batch_norm(const at::Tensor &rows, const at::Tensor &mean, const at::Tensor &inverse_deviation,
                      const Optional &weight, const Optional &bias, const Optional &factor, const Optional &residual,
                      std::optional<double> ceiling, bool /*training*/) {
  const auto guard = on_device_of(rows, mean, inverse_deviation, residual.value_or(rows));
  const Norm norm(rows, mean, inverse_deviation, weight, bias, factor, ceiling);
  const at::Tensor added = residual ? residual_of(*residual, norm.rows) : at::Tensor();
  at::Tensor out = at::empty_like(norm.rows);
  with_type(out.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::batch_norm<T>(out.mutable_data_ptr<T>(), norm.on_device<T>(), data_or_null<T>(added), multiprocessors(),
                        current_stream());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> batch_norm_grad_sums(const at::Tensor &grad, const at::Tensor &rows, const Optional &out,
                                                        const at::Tensor &mean, const at::Tensor &inverse_deviation,
                                                        const Optional &weight, const Optional &bias, const Optional &factor,
                                                        std::optional<double> ceiling) {
  const auto guard = on_device_of(rows, grad, mean, inverse_deviation, out.value_or(rows));
  const Norm norm(rows, mean, inverse_deviation, weight, bias, factor, ceiling);
  const at::Tensor grad_ = grad.contiguous(), out_ = out ? out->contiguous() : at::Tensor();
  check_like("grad", grad_, norm.rows);
  if (out) check_like("out", out_, norm.rows);
  at::Tensor masked = out ? at::empty_like(grad_) : at::empty({0}, grad_.options());
  const auto options = norm.mean.options();
  at::Tensor sums = rows.size(0) == 0 ? at::zeros({2, rows.size(1)}, options) : at::empty({2, rows.size(1)}, options);
  Workspace workspace(grad_);
  with_type(grad_.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::batch_norm_grad_sums<T>(out ? masked.mutable_data_ptr<T>() : nullptr, sums.mutable_data_ptr<cuda::Sum<T>>(),
                                  norm.on_device<T>(), grad_.const_data_ptr<T>(), data_or_null<T>(out_), multiprocessors(),
                                  workspace.allocate(), current_stream());
  });
  return {masked, sums};
}

at::Tensor batch_norm_grad_rows(const at::Tensor &grad, const at::Tensor &rows, const at::Tensor &mean,
                                const at::Tensor &inverse_deviation, const Optional &weight, const Optional &bias,
                                const Optional &factor, std::optional<double> ceiling, const Optional &sums,
                                std::optional<double> count) {
  const auto guard = on_device_of(rows, grad, mean, inverse_deviation, sums.value_or(mean));
  const Norm norm(rows, mean, inverse_deviation, weight, bias, factor, ceiling);
  const at::Tensor grad_ = grad.contiguous();
  check_like("grad", grad_, norm.rows);
  at::Tensor sums_;
  if (sums) {
    TORCH_CHECK_VALUE(sums->dim() == 2 && sums->size(0) == 2 && sums->size(1) == grad_.size(1), "sums must be (2, C), got ",
                      sums->sizes());
    sums_ = sums->to(sum_type(rows)).contiguous();
  }
  at::Tensor grad_rows = at::empty_like(norm.rows);
  with_type(grad_.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::batch_norm_grad_rows<T>(
        grad_rows.mutable_data_ptr<T>(), norm.on_device<T>(), grad_.const_data_ptr<T>(), data_or_null<cuda::Sum<T>>(sums_),
        1 / std::max(1.0, count.value_or(static_cast<double>(grad_.size(0)))), multiprocessors(), current_stream());
  });
  return grad_rows;
}

at::Tensor linear(const at::Tensor &rows, const at::Tensor &kernel, const Optional &bias) {
  const c10::impl::ExcludeDispatchKeyGuard keep_the_type(c10::autocast_dispatch_keyset);
  return bias ? at::addmm(*bias, rows, kernel) : at::mm(rows, kernel);
}

}  // namespace

TORCH_LIBRARY_IMPL(SPARKME_LIBRARY, SPARKME_KEY, m) {
  m.impl("linear", linear);
  m.impl("batch_statistics", batch_statistics);
  m.impl("norm_statistics", norm_statistics);
  m.impl("batch_norm", batch_norm);
  m.impl("batch_norm_grad_sums", batch_norm_grad_sums);
  m.impl("batch_norm_grad_rows", batch_norm_grad_rows);
  m.impl("neighbour_table", neighbour_table);
  m.impl("depthwise_conv", depthwise_conv);
  m.impl("depthwise_conv_grad_rows", depthwise_conv_grad_rows);
  m.impl("depthwise_conv_grad_kernel", depthwise_conv_grad_kernel);
  m.impl("max_pool", max_pool);
  m.impl("max_pool_grad_rows", max_pool_grad_rows);
  m.impl("avg_pool", avg_pool);
  m.impl("voxelise", voxelise);
  m.impl("densify", densify);
}

}  // namespace sparkme
