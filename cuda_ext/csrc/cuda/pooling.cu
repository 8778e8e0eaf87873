// Pooling over a neighbour table. Gradients gather over the inverse table, so that no two threads write one row and sums
// have one order.
#include "tensors.h"

namespace sparkme::cuda {
namespace {

constexpr uint8_t kNone = 255;  // no tap taken yet; a window has fewer

// The block (x: channels, y: rows) that a kernel over rows runs in, and its grid, where an access takes `width` channels.
struct Shape {
  dim3 block, grid;

  Shape(const Tensor &rows, int64_t width)
      : block(row_block(rows.size(1) / width, kThreads)), grid(ceil_div(rows.size(0), block.y)) {}
};

// NaN is larger than everything, and the first of equals stays.
template <typename T>
__device__ __forceinline__ bool exceeds(T value, T best) {
  return value > best || (value != value && best == best);
}

template <typename T, int V>
__global__ void max_pool_rows(T *out, uint8_t *taken, const T *rows, const int32_t *table, int64_t targets, int32_t taps,
                              int32_t channels) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= targets) return;
  for (int32_t c = threadIdx.x * V; c < channels; c += blockDim.x * V) {
    Sum<T> best[V];
    Pack<uint8_t, V> from;
    Pack<T, V> largest;
    for (int v = 0; v < V; ++v) {
      best[v] = 0;
      from.values[v] = kNone;
    }
    for (int32_t tap = 0; tap < taps; ++tap) {
      const int64_t neighbour = table[row * taps + tap];
      if (neighbour < 0) continue;
      const Pack<T, V> pack = load_pack<T, V>(rows + neighbour * channels + c);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Sum<T> value = pack.values[v];
        if (from.values[v] == kNone || exceeds(value, best[v])) {
          best[v] = value;
          from.values[v] = static_cast<uint8_t>(tap);
        }
      }
    }
    for (int v = 0; v < V; ++v) largest.values[v] = static_cast<T>(best[v]);
    store_pack<T, V>(out + row * channels + c, largest);
    store_pack<uint8_t, V>(taken + row * channels + c, from);
  }
}

template <typename T, int V>
__global__ void max_pool_grad(T *out, const T *grad, const uint8_t *taken, const int32_t *inverse, int64_t targets,
                              int32_t taps, int32_t channels) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= targets) return;
  for (int32_t c = threadIdx.x * V; c < channels; c += blockDim.x * V) {
    Sum<T> sum[V] = {};
    for (int32_t tap = 0; tap < taps; ++tap) {
      const int64_t output = inverse[row * taps + tap];
      if (output < 0) continue;
      const Pack<T, V> pack = load_pack<T, V>(grad + output * channels + c);
      const Pack<uint8_t, V> from = load_pack<uint8_t, V>(taken + output * channels + c);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += from.values[v] == tap ? static_cast<Sum<T>>(pack.values[v]) : Sum<T>(0);
    }
    Pack<T, V> result;
    for (int v = 0; v < V; ++v) result.values[v] = static_cast<T>(sum[v]);
    store_pack<T, V>(out + row * channels + c, result);
  }
}

template <typename T, int V>
__global__ void avg_pool_rows(T *out, const T *rows, const int32_t *table, int64_t targets, int32_t taps, int32_t channels) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= targets) return;
  for (int32_t c = threadIdx.x * V; c < channels; c += blockDim.x * V) {
    Sum<T> sum[V] = {};
    for (int32_t tap = 0; tap < taps; ++tap) {
      const int64_t neighbour = table[row * taps + tap];
      if (neighbour < 0) continue;
      const Pack<T, V> pack = load_pack<T, V>(rows + neighbour * channels + c);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += static_cast<Sum<T>>(pack.values[v]);
    }
    Pack<T, V> result;
    for (int v = 0; v < V; ++v) result.values[v] = static_cast<T>(sum[v] / static_cast<Sum<T>>(taps));
    store_pack<T, V>(out + row * channels + c, result);
  }
}

Pair max_pool(const Tensor &rows, const Tensor &table, const Tensor &inverse) {
  const auto guard = on_device_of(rows, table);
  const Tensor rows_ = rows.contiguous(), table_ = table.contiguous();
  check_rows("rows", rows_, rows_.size(0));
  check_table("table", table_);
  TORCH_CHECK_VALUE(table_.size(1) <= 255, "table has ", table_.size(1), " taps, at most 255 can be pooled");
  Tensor out = at::empty({table_.size(0), rows_.size(1)}, rows_.options());
  Tensor taken = at::empty(out.sizes(), rows_.options().dtype(at::kByte));
  with_width({out, rows_, taken}, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const Shape shape(out, V);
    SPARKME_LAUNCH((max_pool_rows<T, V>), shape.grid, shape.block, current_stream(), out.mutable_data_ptr<T>(),
                   taken.mutable_data_ptr<uint8_t>(), rows_.const_data_ptr<T>(), table_.const_data_ptr<int32_t>(), out.size(0),
                   static_cast<int32_t>(table_.size(1)), channels_of(out));
  });
  return {out, taken};
}

Tensor max_pool_grad_rows(const Tensor &grad, const Tensor &taken, const Tensor &inverse) {
  const auto guard = on_device_of(grad, taken, inverse);
  const Tensor grad_ = grad.contiguous(), taken_ = taken.contiguous(), inverse_ = inverse.contiguous();
  check_rows("grad", grad_, grad_.size(0));
  check_table("inverse", inverse_);
  TORCH_CHECK_VALUE(taken_.scalar_type() == at::kByte && taken_.sizes() == grad_.sizes(), "taken must be uint8 of ",
                    grad_.sizes(), ", got ", taken_.scalar_type(), " ", taken_.sizes());
  Tensor out = at::empty({inverse_.size(0), grad_.size(1)}, grad_.options());
  with_width({out, grad_, taken_}, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const Shape shape(out, V);
    SPARKME_LAUNCH((max_pool_grad<T, V>), shape.grid, shape.block, current_stream(), out.mutable_data_ptr<T>(),
                   grad_.const_data_ptr<T>(), taken_.const_data_ptr<uint8_t>(), inverse_.const_data_ptr<int32_t>(), out.size(0),
                   static_cast<int32_t>(inverse_.size(1)), channels_of(out));
  });
  return out;
}

Tensor avg_pool(const Tensor &rows, const Tensor &table, const Tensor &inverse) {
  const auto guard = on_device_of(rows, table);
  const Tensor rows_ = rows.contiguous(), table_ = table.contiguous();
  check_rows("rows", rows_, rows_.size(0));
  check_table("table", table_);
  Tensor out = at::empty({table_.size(0), rows_.size(1)}, rows_.options());
  with_width({out, rows_}, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const Shape shape(out, V);
    SPARKME_LAUNCH((avg_pool_rows<T, V>), shape.grid, shape.block, current_stream(), out.mutable_data_ptr<T>(),
                   rows_.const_data_ptr<T>(), table_.const_data_ptr<int32_t>(), out.size(0),
                   static_cast<int32_t>(table_.size(1)), channels_of(out));
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(SPARKME_LIBRARY, SPARKME_KEY, m) {
  m.impl("max_pool", max_pool);
  m.impl("max_pool_grad_rows", max_pool_grad_rows);
  m.impl("avg_pool", avg_pool);
}

}  // namespace sparkme::cuda
