// Pooling over a neighbour table. Gradients gather over the inverse table, so that no two threads write one row and sums
// have one order.
#include "operators.h"

namespace sparkme::cuda {
namespace {

constexpr int32_t kThreads = 256;
constexpr uint8_t kNone = 255;  // no tap taken yet; a window has fewer

// The block (x: channels, y: rows) that a kernel over rows runs in, and its grid.
struct Shape {
  dim3 block, grid;

  Shape(int64_t rows, int64_t vectors) : block(row_block(vectors, kThreads)), grid(ceil_div(rows, block.y)) {}
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

}  // namespace

template <typename T>
void max_pool(T *out, uint8_t *taken, const T *rows, const int32_t *table, int64_t targets, int32_t taps, int32_t channels,
              Stream stream) {
  if (targets == 0 || channels == 0) return;
  // `taken` is read and written in packs of as many bytes as there are channels in a pack of T.
  const bool wide = fits_widest<T>(channels, out, rows, taken);
  const Shape shape(targets, wide ? channels / kWidest<T> : channels);
  if (wide) {
    SPARKME_LAUNCH((max_pool_rows<T, kWidest<T>>), shape.grid, shape.block, stream, out, taken, rows, table, targets, taps,
                   channels);
  } else {
    SPARKME_LAUNCH((max_pool_rows<T, 1>), shape.grid, shape.block, stream, out, taken, rows, table, targets, taps, channels);
  }
}

template <typename T>
void max_pool_grad_rows(T *out, const T *grad, const uint8_t *taken, const int32_t *inverse, int64_t targets, int32_t taps,
                        int32_t channels, Stream stream) {
  if (targets == 0 || channels == 0) return;
  const bool wide = fits_widest<T>(channels, out, grad, taken);
  const Shape shape(targets, wide ? channels / kWidest<T> : channels);
  if (wide) {
    SPARKME_LAUNCH((max_pool_grad<T, kWidest<T>>), shape.grid, shape.block, stream, out, grad, taken, inverse, targets, taps,
                   channels);
  } else {
    SPARKME_LAUNCH((max_pool_grad<T, 1>), shape.grid, shape.block, stream, out, grad, taken, inverse, targets, taps, channels);
  }
}

template <typename T>
void avg_pool(T *out, const T *rows, const int32_t *table, int64_t targets, int32_t taps, int32_t channels, Stream stream) {
  if (targets == 0 || channels == 0) return;
  const bool wide = fits_widest<T>(channels, out, rows);
  const Shape shape(targets, wide ? channels / kWidest<T> : channels);
  if (wide) {
    SPARKME_LAUNCH((avg_pool_rows<T, kWidest<T>>), shape.grid, shape.block, stream, out, rows, table, targets, taps, channels);
  } else {
    SPARKME_LAUNCH((avg_pool_rows<T, 1>), shape.grid, shape.block, stream, out, rows, table, targets, taps, channels);
  }
}

#define SPARKME_INSTANTIATE(T)                                                                                              \
  template void max_pool<T>(T *, uint8_t *, const T *, const int32_t *, int64_t, int32_t, int32_t, Stream);                 \
  template void max_pool_grad_rows<T>(T *, const T *, const uint8_t *, const int32_t *, int64_t, int32_t, int32_t, Stream); \
  template void avg_pool<T>(T *, const T *, const int32_t *, int64_t, int32_t, int32_t, Stream);
SPARKME_INSTANTIATE(double)
SPARKME_INSTANTIATE(float)
SPARKME_INSTANTIATE(c10::BFloat16)
#undef SPARKME_INSTANTIATE

}  // namespace sparkme::cuda
