// Batch norm of rows with what follows it, as cpu/norm.cpp has it: statistics in one pass, the result in one, and the gradient
// in two. Memory is what bounds all of them.
//
// A block has a tile of channels (x, a vector each) and a part of the rows, over which its threads (y) take turns, so a thread
// keeps the numbers of its channels in registers. Sums over a block's rows are in float32 (float64 for float64 rows), about
// numbers near the mean; those of the parts are joined in float64, always in the same order.
#include <cmath>

#include "operators.h"

namespace sparkme::cuda {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kLanes = 32;             // along channels
constexpr int32_t kJoinThreads = 32 * 32;  // of a block that joins parts: channels by parts

// How a pass over (count, channels) rows is divided.
struct Division {
  dim3 block, grid;
  int64_t part;  // rows of a block

  Division(int64_t count, int64_t vectors, int32_t blocks) : block(row_block(std::min<int64_t>(vectors, kLanes), kThreads)) {
    const int64_t tiles = ceil_div(vectors, block.x);
    const int64_t parts = std::min(ceil_div(blocks, tiles), ceil_div(count, block.y));
    part = ceil_div(ceil_div(count, std::min<int64_t>(parts, 65535)), block.y) * block.y;
    grid = dim3(tiles, ceil_div(count, part));
  }
};

// Calls load(u, row) and then use(u, row) for the rows of this thread, `Unroll` of them at a time, u = 0, 1, ..., so that
// their loads are under way together.
template <int Unroll, typename Load, typename Use>
__device__ __forceinline__ void for_rows(int64_t count, int64_t part, const Load &load, const Use &use) {
  const int64_t begin = blockIdx.y * part, end = begin + part < count ? begin + part : count;
  for (int64_t first = begin + threadIdx.y; first < end; first += Unroll * blockDim.y) {
#pragma unroll
    for (int u = 0; u < Unroll; ++u) {
      if (first + u * blockDim.y < end) load(u, first + u * blockDim.y);
    }
#pragma unroll
    for (int u = 0; u < Unroll; ++u) {
      if (first + u * blockDim.y < end) use(u, first + u * blockDim.y);
    }
  }
}

template <typename S, int V>
struct SharedSums {
  S values[2 * V][kThreads];
};

// Adds the threads of a block that have the same channels, and writes the sums of its part: partial[part][2][channels].
template <typename S, int V>
__device__ __forceinline__ void write_sums(S *partial, const S (&first)[V], const S (&second)[V], int32_t channels, int32_t c) {
  using Shared = SharedSums<S, V>;
  SPARKME_SHARED(Shared, shared);
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    shared.values[v][thread] = first[v];
    shared.values[V + v][thread] = second[v];
  }
  for (int32_t half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int32_t>(threadIdx.y) < half) {
#pragma unroll
      for (int v = 0; v < 2 * V; ++v) shared.values[v][thread] += shared.values[v][thread + half * blockDim.x];
    }
  }
  if (threadIdx.y > 0 || c >= channels) return;
  S *to = partial + static_cast<int64_t>(blockIdx.y) * 2 * channels + c;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    to[v] = shared.values[v][thread];
    to[channels + v] = shared.values[V + v][thread];
  }
}

// The sums of x - o and of its square, o being the part's first row.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    statistics(Sum<T> *partial, const T *rows, int64_t count, int64_t part, int32_t channels) {
  constexpr int kUnroll = 4;
  const int32_t c = (blockIdx.x * blockDim.x + threadIdx.x) * V;
  Sum<T> sums[V] = {}, squares[V] = {}, origin[V];
  if (c < channels) {
    const Pack<T, V> first = load_pack<T, V>(rows + blockIdx.y * part * channels + c);
#pragma unroll
    for (int v = 0; v < V; ++v) origin[v] = static_cast<Sum<T>>(first.values[v]);
    Pack<T, V> x[kUnroll];
    for_rows<kUnroll>(
        count, part, [&](int u, int64_t row) { x[u] = load_pack<T, V>(rows + row * channels + c); },
        [&](int u, int64_t) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const Sum<T> apart = static_cast<Sum<T>>(x[u].values[v]) - origin[v];
            sums[v] += apart;
            squares[v] += apart * apart;
          }
        });
  }
  write_sums<Sum<T>, V>(partial, sums, squares, channels, c);
}

struct SharedJoin {
  double values[2][kJoinThreads];
};

// Adds two numbers of every part for the channel of a thread; true for the one thread that has the result.
template <typename Each>
__device__ __forceinline__ bool join(int64_t parts, bool exists, const Each &each, double &first, double &second) {
  SPARKME_SHARED(SharedJoin, shared);
  first = second = 0;
  if (exists) {
#pragma unroll 4
    for (int64_t p = threadIdx.y; p < parts; p += blockDim.y) each(p, first, second);
  }
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  shared.values[0][thread] = first;
  shared.values[1][thread] = second;
  for (int32_t half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int32_t>(threadIdx.y) < half) {
      shared.values[0][thread] += shared.values[0][thread + half * blockDim.x];
      shared.values[1][thread] += shared.values[1][thread + half * blockDim.x];
    }
  }
  first = shared.values[0][thread];
  second = shared.values[1][thread];
  return exists && threadIdx.y == 0;
}

template <typename S>
__device__ __forceinline__ void move(S *running, S value, S momentum) {
  *running += momentum * (value - *running);
}

// Moves the sums of every part to one origin, the first row of all, adds them, and makes the statistics of them.
template <typename T>
__global__ void __launch_bounds__(kJoinThreads)
    join_statistics(Statistics<Sum<T>> statistics, const Sum<T> *partial, const T *rows, int64_t count, int64_t part,
                    int64_t parts, int32_t channels) {
  const int32_t c = blockIdx.x * blockDim.x + threadIdx.x;
  const bool exists = c < channels;
  const double origin = exists ? static_cast<double>(static_cast<Sum<T>>(rows[c])) : 0.0;
  double sum, square;
  const bool done = join(
      parts, exists,
      [&](int64_t p, double &first, double &second) {
        const double own = part < count - p * part ? part : count - p * part;
        const double apart = static_cast<double>(static_cast<Sum<T>>(rows[p * part * channels + c])) - origin;
        const double s = partial[p * 2 * channels + c], q = partial[(p * 2 + 1) * channels + c];
        first += s + own * apart;
        second += q + (2 * s + own * apart) * apart;
      },
      sum, square);
  if (!done) return;
  const double offset = sum / count, biased = square / count - offset * offset;
  const Sum<T> mean = static_cast<Sum<T>>(origin + offset), variance = static_cast<Sum<T>>(biased < 0 ? 0 : biased);
  statistics.mean[c] = mean;
  if (statistics.variance) statistics.variance[c] = variance;
  if (statistics.deviation) statistics.deviation[c] = 1 / sqrt(variance + statistics.epsilon);
  if (statistics.running_mean) move(statistics.running_mean + c, mean, statistics.momentum);
  if (statistics.running_var) move(statistics.running_var + c, variance * statistics.unbiased, statistics.momentum);
}

// The sums of the gradient, of itself and times the normalised rows.
template <typename S>
__global__ void __launch_bounds__(kJoinThreads)
    join_grad_sums(S *sums, const S *partial, const S *deviation, int64_t parts, int32_t channels) {
  const int32_t c = blockIdx.x * blockDim.x + threadIdx.x;
  double first, second;
  const bool done = join(
      parts, c < channels,
      [&](int64_t p, double &a, double &b) {
        a += partial[p * 2 * channels + c];
        b += partial[(p * 2 + 1) * channels + c];
      },
      first, second);
  if (!done) return;
  sums[c] = static_cast<S>(first);
  sums[channels + c] = static_cast<S>(second * deviation[c]);
}

// The numbers of the channels that a thread has.
template <typename T, int V>
struct Channels {
  Sum<T> mean[V], scale[V], shift[V];

  __device__ __forceinline__ Channels(const Norm<T> &norm, int32_t c) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean[v] = norm.mean[c + v];
      scale[v] = norm.weight ? norm.weight[c + v] * norm.deviation[c + v] : norm.deviation[c + v];
      shift[v] = norm.bias ? norm.bias[c + v] : Sum<T>(0);
    }
  }
};

template <typename T>
__device__ __forceinline__ Sum<T> factor_of(const Norm<T> &norm, int64_t row) {
  return norm.factors ? norm.factors[static_cast<int32_t>(row) / norm.rows_per_sample] : Sum<T>(1);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) normalise(T *out, Norm<T> norm, const T *residual, int64_t part) {
  constexpr int kUnroll = 2;
  const int32_t c = (blockIdx.x * blockDim.x + threadIdx.x) * V, channels = norm.channels;
  if (c >= channels) return;
  const Channels<T, V> of(norm, c);
  const bool clamps = norm.ceiling == norm.ceiling;
  Pack<T, V> x[kUnroll], added[kUnroll];
  for_rows<kUnroll>(
      norm.count, part,
      [&](int u, int64_t row) {
        x[u] = load_pack<T, V>(norm.rows + row * channels + c);
        if (residual) added[u] = load_pack<T, V>(residual + row * channels + c);
      },
      [&](int u, int64_t row) {
        const Sum<T> factor = factor_of(norm, row);
        Pack<T, V> result;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          Sum<T> y = ((static_cast<Sum<T>>(x[u].values[v]) - of.mean[v]) * of.scale[v] + of.shift[v]) * factor;
          if (residual) y += static_cast<Sum<T>>(added[u].values[v]);
          if (clamps) {
            y = y < 0 ? Sum<T>(0) : y;  // NaN stays
            y = y > norm.ceiling ? norm.ceiling : y;
          }
          result.values[v] = static_cast<T>(y);
        }
        store_pack<T, V>(out + row * channels + c, result);
      });
}

// The gradient where the result, y, was not clamped.
template <typename S>
__device__ __forceinline__ S where_inside(S y, S ceiling, S grad) {
  return y > 0 && y < ceiling ? grad : S(0);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    grad_sums(T *masked, Sum<T> *partial, Norm<T> norm, const T *grad, const T *out, int64_t part) {
  constexpr int kUnroll = 2;
  const int32_t c = (blockIdx.x * blockDim.x + threadIdx.x) * V, channels = norm.channels;
  const bool clamps = norm.ceiling == norm.ceiling;
  Sum<T> sums[V] = {}, products[V] = {};
  if (c < channels) {
    const Channels<T, V> of(norm, c);
    Pack<T, V> x[kUnroll], g[kUnroll], y[kUnroll];
    for_rows<kUnroll>(
        norm.count, part,
        [&](int u, int64_t row) {
          x[u] = load_pack<T, V>(norm.rows + row * channels + c);
          g[u] = load_pack<T, V>(grad + row * channels + c);
          if (out) y[u] = load_pack<T, V>(out + row * channels + c);
        },
        [&](int u, int64_t row) {
          const Sum<T> factor = factor_of(norm, row);
          Pack<T, V> kept;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const Sum<T> centred = static_cast<Sum<T>>(x[u].values[v]) - of.mean[v];
            Sum<T> value = static_cast<Sum<T>>(g[u].values[v]);
            if (clamps) {
              const Sum<T> result = out ? static_cast<Sum<T>>(y[u].values[v]) : (centred * of.scale[v] + of.shift[v]) * factor;
              value = where_inside(result, norm.ceiling, value);
            }
            kept.values[v] = static_cast<T>(value);
            sums[v] += value * factor;
            products[v] += value * factor * centred;
          }
          if (out) store_pack<T, V>(masked + row * channels + c, kept);
        });
  }
  write_sums<Sum<T>, V>(partial, sums, products, channels, c);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    grad_rows(T *result, Norm<T> norm, const T *grad, const Sum<T> *sums, Sum<T> per_row, int64_t part) {
  constexpr int kUnroll = 2;
  const int32_t c = (blockIdx.x * blockDim.x + threadIdx.x) * V, channels = norm.channels;
  if (c >= channels) return;
  const Channels<T, V> of(norm, c);
  const bool clamps = norm.ceiling == norm.ceiling;
  Sum<T> constant[V] = {}, slope[V] = {};
  if (sums) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      constant[v] = -sums[c + v] * per_row * of.scale[v];
      slope[v] = -sums[channels + c + v] * per_row * of.scale[v] * norm.deviation[c + v];
    }
  }
  Pack<T, V> x[kUnroll], g[kUnroll];
  for_rows<kUnroll>(
      norm.count, part,
      [&](int u, int64_t row) {
        x[u] = load_pack<T, V>(norm.rows + row * channels + c);
        g[u] = load_pack<T, V>(grad + row * channels + c);
      },
      [&](int u, int64_t row) {
        const Sum<T> factor = factor_of(norm, row);
        Pack<T, V> to;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const Sum<T> centred = static_cast<Sum<T>>(x[u].values[v]) - of.mean[v];
          Sum<T> value = static_cast<Sum<T>>(g[u].values[v]);
          if (clamps) value = where_inside((centred * of.scale[v] + of.shift[v]) * factor, norm.ceiling, value);
          to.values[v] = static_cast<T>(of.scale[v] * factor * value + slope[v] * centred + constant[v]);
        }
        store_pack<T, V>(result + row * channels + c, to);
      });
}

// Blocks of a multiprocessor, as was fastest on an H200. Where parts have to be joined afterwards, few.
constexpr int32_t kSumBlocks = 2, kNormaliseBlocks = 8, kGradBlocks = 4;

// Calls f(std::integral_constant<int, V>) for the widest access that fits.
template <typename T, typename F, typename... Pointers>
void with_width(int32_t channels, const F &f, Pointers... pointers) {
  if (fits_widest<T>(channels, pointers...)) {
    f(std::integral_constant<int, kWidest<T>>());
  } else {
    f(std::integral_constant<int, 1>());
  }
}

dim3 join_grid(int32_t channels) { return dim3(ceil_div(channels, 32)); }

}  // namespace

template <typename T>
void batch_statistics(const Statistics<Sum<T>> &wanted, const T *rows, int64_t count, int32_t channels, int32_t multiprocessors,
                      const Allocate &allocate, Stream stream) {
  if (count == 0 || channels == 0) return;
  with_width<T>(
      channels,
      [&](auto width) {
        constexpr int V = decltype(width)::value;
        const Division division(count, channels / V, kSumBlocks * multiprocessors);
        auto *partial = static_cast<Sum<T> *>(allocate(sizeof(Sum<T>) * division.grid.y * 2 * channels));
        SPARKME_LAUNCH((statistics<T, V>), division.grid, division.block, stream, partial, rows, count, division.part,
                       channels);
        SPARKME_LAUNCH((join_statistics<T>), join_grid(channels), dim3(32, 32), stream, wanted,
                       static_cast<const Sum<T> *>(partial), rows, count, division.part, static_cast<int64_t>(division.grid.y),
                       channels);
      },
      rows);
}

template <typename T>
void batch_norm(T *out, const Norm<T> &norm, const T *residual, int32_t multiprocessors, Stream stream) {
  if (norm.count == 0 || norm.channels == 0) return;
  with_width<T>(
      norm.channels,
      [&](auto width) {
        constexpr int V = decltype(width)::value;
        const Division division(norm.count, norm.channels / V, kNormaliseBlocks * multiprocessors);
        SPARKME_LAUNCH((normalise<T, V>), division.grid, division.block, stream, out, norm, residual, division.part);
      },
      out, norm.rows, residual);
}

template <typename T>
void batch_norm_grad_sums(T *masked, Sum<T> *sums, const Norm<T> &norm, const T *grad, const T *out, int32_t multiprocessors,
                          const Allocate &allocate, Stream stream) {
  if (norm.count == 0 || norm.channels == 0) return;
  with_width<T>(
      norm.channels,
      [&](auto width) {
        constexpr int V = decltype(width)::value;
        const Division division(norm.count, norm.channels / V, kSumBlocks * multiprocessors);
        auto *partial = static_cast<Sum<T> *>(allocate(sizeof(Sum<T>) * division.grid.y * 2 * norm.channels));
        SPARKME_LAUNCH((grad_sums<T, V>), division.grid, division.block, stream, masked, partial, norm, grad, out,
                       division.part);
        SPARKME_LAUNCH((join_grad_sums<Sum<T>>), join_grid(norm.channels), dim3(32, 32), stream, sums,
                       static_cast<const Sum<T> *>(partial), norm.deviation, static_cast<int64_t>(division.grid.y),
                       norm.channels);
      },
      norm.rows, grad, out, masked);
}

template <typename T>
void batch_norm_grad_rows(T *result, const Norm<T> &norm, const T *grad, const Sum<T> *sums, double per_row,
                          int32_t multiprocessors, Stream stream) {
  if (norm.count == 0 || norm.channels == 0) return;
  with_width<T>(
      norm.channels,
      [&](auto width) {
        constexpr int V = decltype(width)::value;
        const Division division(norm.count, norm.channels / V, kGradBlocks * multiprocessors);
        SPARKME_LAUNCH((grad_rows<T, V>), division.grid, division.block, stream, result, norm, grad, sums,
                       static_cast<Sum<T>>(per_row), division.part);
      },
      result, norm.rows, grad);
}

#define SPARKME_INSTANTIATE(T)                                                                                           \
  template void batch_statistics<T>(const Statistics<Sum<T>> &, const T *, int64_t, int32_t, int32_t, const Allocate &,  \
                                    Stream);                                                                             \
  template void batch_norm<T>(T *, const Norm<T> &, const T *, int32_t, Stream);                                         \
  template void batch_norm_grad_sums<T>(T *, Sum<T> *, const Norm<T> &, const T *, const T *, int32_t, const Allocate &, \
                                        Stream);                                                                         \
  template void batch_norm_grad_rows<T>(T *, const Norm<T> &, const T *, const Sum<T> *, double, int32_t, Stream);
SPARKME_INSTANTIATE(double)
SPARKME_INSTANTIATE(float)
SPARKME_INSTANTIATE(c10::BFloat16)
#undef SPARKME_INSTANTIATE

}  // namespace sparkme::cuda
