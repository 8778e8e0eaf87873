// Depthwise convolution of any patch and window, row by row. See depthwise.cu.
#include "depthwise.h"

namespace sparkme::cuda {
namespace {

constexpr int32_t kRowThreads = 128;
constexpr int32_t kNeighbours = 1024;  // that a block finds at a time

// The output rows (input rows if `transposed`) of a convolution, and what is on the other side of it.
struct Sides {
  Sites sites;
  Window window;
  int64_t num_rows;
  int32_t pixels, side;
  bool transposed;

  Sides(const Geometry &geometry, bool transposed_)
      : sites(geometry.sites),
        window(geometry.window),
        pixels(geometry.pixels),
        side(transposed_ ? geometry.pixels : geometry.pixels / geometry.window.stride),
        transposed(transposed_) {
    num_rows = geometry.patches * side * side;
  }

  __device__ __forceinline__ int64_t neighbour(int64_t row, int32_t tap) const {
    const int32_t area = side * side, within = static_cast<int32_t>(row % area);
    const int32_t patch = static_cast<int32_t>(row / area), y = within / side, x = within % side;
    return transposed ? output_row(sites, window, patch, y, x, tap, pixels)
                      : input_row(sites, window, patch, y, x, tap, pixels);
  }
};

struct NeighbourShared {
  int64_t rows[kNeighbours];
};

// Threads: x along channels, y along rows.
template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads)
    conv_rows(T *out, const T *rows, const T *kernel, const T *bias, Sides sides, int32_t channels) {
  SPARKME_SHARED(NeighbourShared, shared);
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x, row_count = blockDim.y;
  const int32_t taps = sides.window.taps(), taps_at_once = kNeighbours / row_count;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * row_count, row = first + threadIdx.y;
  const int32_t channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  const bool exists = row < sides.num_rows && channel < channels;
  Sum<T> sums[V] = {};
  if (bias && exists) {
    const Pack<T, V> start = load_pack<T, V>(bias + channel);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] = static_cast<Sum<T>>(start.values[v]);
  }
  for (int32_t first_tap = 0; first_tap < taps; first_tap += taps_at_once) {
    const int32_t count = taps - first_tap < taps_at_once ? taps - first_tap : taps_at_once;
    for (int32_t i = thread; i < count * row_count; i += kRowThreads) {
      shared.rows[i] = first + i / count < sides.num_rows ? sides.neighbour(first + i / count, first_tap + i % count) : -1;
    }
    __syncthreads();
    for (int32_t i = 0; exists && i < count; ++i) {
      const int64_t neighbour = shared.rows[threadIdx.y * count + i];
      if (neighbour < 0) continue;
      const Pack<T, V> values = load_pack<T, V>(rows + neighbour * channels + channel);
      const Pack<T, V> weights = load_pack<T, V>(kernel + static_cast<int64_t>(first_tap + i) * channels + channel);
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += static_cast<Sum<T>>(values.values[v]) * static_cast<Sum<T>>(weights.values[v]);
    }
    __syncthreads();
  }
  if (!exists) return;
  Pack<T, V> result;
  for (int v = 0; v < V; ++v) result.values[v] = static_cast<T>(sums[v]);
  store_pack<T, V>(out + row * channels + channel, result);
}

template <typename T, int V>
struct RowGradShared {
  int64_t rows[kNeighbours];
  Sum<T> sums[kRowThreads][V];
};

// Block (chunk, tap, channels) sums over a chunk of the rows.
template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads)
    grad_rows(Sum<T> *partial, const T *rows, const T *grad, Sides sides, int64_t chunk, int32_t channels) {
  using S = RowGradShared<T, V>;
  SPARKME_SHARED(S, shared);
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x, tap = blockIdx.y;
  const int32_t channel = (blockIdx.z * blockDim.x + threadIdx.x) * V;
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < sides.num_rows ? begin + chunk : sides.num_rows;
  Sum<T> sums[V] = {};
  for (int64_t first = begin; first < end; first += kNeighbours) {
    const int32_t count = static_cast<int32_t>(end - first < kNeighbours ? end - first : kNeighbours);
    for (int32_t i = thread; i < count; i += kRowThreads) shared.rows[i] = sides.neighbour(first + i, tap);
    __syncthreads();
    for (int32_t i = threadIdx.y; channel < channels && i < count; i += blockDim.y) {
      if (shared.rows[i] < 0) continue;
      const Pack<T, V> values = load_pack<T, V>(rows + shared.rows[i] * channels + channel);
      const Pack<T, V> grads = load_pack<T, V>(grad + (first + i) * channels + channel);
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += static_cast<Sum<T>>(values.values[v]) * static_cast<Sum<T>>(grads.values[v]);
    }
    __syncthreads();
  }
  for (int v = 0; v < V; ++v) shared.sums[thread][v] = sums[v];
  __syncthreads();
  if (threadIdx.y > 0 || channel >= channels) return;
  for (int32_t y = 1; y < static_cast<int32_t>(blockDim.y); ++y) {
    for (int v = 0; v < V; ++v) sums[v] += shared.sums[y * blockDim.x + threadIdx.x][v];
  }
  Sum<T> *to = partial + (static_cast<int64_t>(blockIdx.x) * gridDim.y + tap) * channels + channel;
  for (int v = 0; v < V; ++v) to[v] = sums[v];
}

template <typename T, int V>
void launch_conv(const Depthwise<T> &call) {
  const Sides sides(call.geometry, call.transposed);
  const int64_t vectors = ceil_div(call.channels, V);
  const dim3 block = row_block(vectors, kRowThreads);
  const dim3 grid(ceil_div(sides.num_rows, block.y), ceil_div(vectors, block.x));
  SPARKME_LAUNCH((conv_rows<T, V>), grid, block, call.stream, call.out, call.rows, call.kernel, call.bias, sides,
                 call.channels);
}

template <typename T, int V>
void launch_grad(const DepthwiseGradKernel<T> &call) {
  const Sides sides(call.geometry, false);
  const int64_t vectors = ceil_div(call.channels, V), taps = call.geometry.window.taps();
  const dim3 block = row_block(vectors, kRowThreads);
  const int64_t lines = ceil_div(vectors, block.x);
  static const int32_t at_a_time = blocks_at_a_time(&grad_rows<T, V>, kRowThreads);
  const int64_t blocks = blocks_for(ceil_div(sides.num_rows, 64), lines * taps, call.geometry, at_a_time, 2);
  Sum<T> *const partial = allocate_partial(call, blocks);
  SPARKME_LAUNCH((grad_rows<T, V>), dim3(blocks, taps, lines), block, call.stream, partial, call.rows, call.grad, sides,
                 ceil_div(sides.num_rows, blocks), call.channels);
  reduce(call, partial, blocks);
}

}  // namespace

template <typename T>
void convolve_rows(const Depthwise<T> &call, bool wide) {
  wide ? launch_conv<T, kWidest<T>>(call) : launch_conv<T, 1>(call);
}

template <typename T>
void correlate_rows(const DepthwiseGradKernel<T> &call, bool wide) {
  wide ? launch_grad<T, kWidest<T>>(call) : launch_grad<T, 1>(call);
}

template void convolve_rows(const Depthwise<double> &, bool);
template void convolve_rows(const Depthwise<float> &, bool);
template void convolve_rows(const Depthwise<c10::BFloat16> &, bool);
template void correlate_rows(const DepthwiseGradKernel<double> &, bool);
template void correlate_rows(const DepthwiseGradKernel<float> &, bool);
template void correlate_rows(const DepthwiseGradKernel<c10::BFloat16> &, bool);

}  // namespace sparkme::cuda
