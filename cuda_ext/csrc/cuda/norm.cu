// Batch norm of rows with what follows it, as cpu/norm.cpp has it: statistics in one pass, the result in one, and the gradient
// in two. Memory is what bounds all of them.
//
// A block has a tile of channels (x, a vector each) and a part of the rows, over which its threads (y) take turns, so a thread
// keeps the numbers of its channels in registers. Sums over a block's rows are in float32 (float64 for float64 rows), about
// numbers near the mean; those of the parts are joined in float64, always in the same order.
#include <ATen/ops/zeros.h>

#include <cmath>

#include "tensors.h"

namespace sparkme::cuda {
namespace {

// A batch norm of rows (count, channels), and what follows it. Numbers per channel are in the type of sums.
template <typename T>
struct NormRows {
  const T *rows;
  int64_t count;
  int32_t channels;
  const Sum<T> *mean, *deviation;  // the latter's inverse
  const Sum<T> *weight, *bias;     // may be null
  const Sum<T> *factors;           // of each sample; may be null
  int32_t rows_per_sample;
  Sum<T> ceiling;  // results are clamped to [0, ceiling]; NaN for not at all
};

// What becomes of the statistics of each channel; all but the mean may be null.
template <typename S>
struct Statistics {
  S *mean, *variance, *deviation;  // (biased) variance; 1 / sqrt(variance + epsilon)
  S *running_mean, *running_var;   // moved towards mean and `unbiased` times the variance, by `momentum`
  S epsilon, unbiased, momentum;
};

constexpr int32_t kNormLanes = 32;         // along channels
constexpr int32_t kJoinThreads = 32 * 32;  // of a block that joins parts: channels by parts

// How a pass over (count, channels) rows is divided.
struct Division {
  dim3 block, grid;
  int64_t part;  // rows of a block

  Division(int64_t count, int64_t vectors, int32_t blocks)
      : block(row_block(std::min<int64_t>(vectors, kNormLanes), kThreads)) {
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

  __device__ __forceinline__ Channels(const NormRows<T> &norm, int32_t c) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean[v] = norm.mean[c + v];
      scale[v] = norm.weight ? norm.weight[c + v] * norm.deviation[c + v] : norm.deviation[c + v];
      shift[v] = norm.bias ? norm.bias[c + v] : Sum<T>(0);
    }
  }
};

template <typename T>
__device__ __forceinline__ Sum<T> factor_of(const NormRows<T> &norm, int64_t row) {
  return norm.factors ? norm.factors[static_cast<int32_t>(row) / norm.rows_per_sample] : Sum<T>(1);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) normalise(T *out, NormRows<T> norm, const T *residual, int64_t part) {
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
    grad_sums(T *masked, Sum<T> *partial, NormRows<T> norm, const T *grad, const T *out, int64_t part) {
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
    norm_grad_rows(T *result, NormRows<T> norm, const T *grad, const Sum<T> *sums, Sum<T> per_row, int64_t part) {
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

dim3 join_grid(int32_t channels) { return dim3(ceil_div(channels, 32)); }

// A number per channel, or per sample, in the type of sums; undefined where there is none.
Tensor numbers(const char *name, const Optional &value, int64_t size, const Tensor &rows) {
  if (!value) return {};
  TORCH_CHECK_VALUE(value->dim() == 1 && value->size(0) == size, name, " must be (", size, ",), got ", value->sizes());
  TORCH_CHECK_VALUE(value->device() == rows.device(), name, " must be on ", rows.device(), ", got ", value->device());
  return value->to(sum_type(rows)).contiguous();
}

// What the kernels of a batch norm read, and whose memory it is.
struct Norm {
  Tensor rows, mean, deviation, weight, bias, factors;
  double ceiling;

  Norm(const Tensor &rows_, const Tensor &mean_, const Tensor &inverse_deviation, const Optional &weight_,
       const Optional &bias_, const Optional &factor, Number ceiling_)
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
  NormRows<T> on_device() const {
    using S = Sum<T>;
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
Tensor statistics_of(const Tensor &rows, const Finish &finish) {
  const Tensor rows_ = rows.contiguous();
  const int64_t count = rows_.size(0), channels = rows_.size(1);
  Tensor mean = at::empty({channels}, rows_.options().dtype(sum_type(rows_)));
  with_width({rows_}, [&](auto zero, auto width) {
    using T = decltype(zero);
    using S = Sum<T>;
    constexpr int V = decltype(width)::value;
    Statistics<S> wanted = {};
    wanted.mean = mean.mutable_data_ptr<S>();
    finish(wanted);
    const Division division(count, channels / V, kSumBlocks * multiprocessors());
    const Tensor partial = at::empty({division.grid.y, 2, channels}, mean.options());
    SPARKME_LAUNCH((statistics<T, V>), division.grid, division.block, current_stream(), partial.mutable_data_ptr<S>(),
                   rows_.const_data_ptr<T>(), count, division.part, channels_of(rows_));
    SPARKME_LAUNCH((join_statistics<T>), join_grid(channels), dim3(32, 32), current_stream(), wanted,
                   partial.const_data_ptr<S>(), rows_.const_data_ptr<T>(), count, division.part,
                   static_cast<int64_t>(division.grid.y), channels_of(rows_));
  });
  return mean;
}

// Two numbers per channel, for the statistics of no rows.
Pair zeros_of(const Tensor &rows) {
  const auto options = rows.options().dtype(sum_type(rows));
  return {at::zeros({rows.size(1)}, options), at::zeros({rows.size(1)}, options)};
}

Pair batch_statistics(const Tensor &rows) {
  const auto guard = on_device_of(rows);
  check_rows("rows", rows, rows.size(0));
  if (rows.size(0) == 0) return zeros_of(rows);
  Tensor variance = at::empty({rows.size(1)}, rows.options().dtype(sum_type(rows)));
  Tensor mean = statistics_of(rows, [&](auto &statistics) {
    using S = std::remove_pointer_t<decltype(statistics.mean)>;
    statistics.variance = variance.mutable_data_ptr<S>();
  });
  return {mean, variance};
}

Pair norm_statistics(const Tensor &rows, double epsilon, const Optional &running_mean, const Optional &running_var,
                     double momentum) {
  const auto guard = on_device_of(rows);
  check_rows("rows", rows, rows.size(0));
  if (rows.size(0) == 0) return zeros_of(rows);
  const auto type = sum_type(rows);
  Tensor deviation = at::empty({rows.size(1)}, rows.options().dtype(type));
  check_running("running_mean", running_mean, deviation);
  check_running("running_var", running_var, deviation);
  // Those of another type, as of float64 weights under autocast, are copied there and back.
  Tensor own_mean = running_mean ? running_mean->to(type).contiguous() : Tensor();
  Tensor own_var = running_var ? running_var->to(type).contiguous() : Tensor();
  Tensor mean = statistics_of(rows, [&](auto &statistics) {
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

Tensor batch_norm(const Tensor &rows, const Tensor &mean, const Tensor &inverse_deviation, const Optional &weight,
                  const Optional &bias, const Optional &factor, const Optional &residual, Number ceiling, bool /*training*/) {
  const auto guard = on_device_of(rows, mean, inverse_deviation, residual.value_or(rows));
  const Norm norm(rows, mean, inverse_deviation, weight, bias, factor, ceiling);
  const Tensor added = residual ? residual_of(*residual, norm.rows) : Tensor();
  Tensor out = at::empty_like(norm.rows);
  with_width({out, norm.rows, added}, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const Division division(out.size(0), out.size(1) / V, kNormaliseBlocks * multiprocessors());
    SPARKME_LAUNCH((normalise<T, V>), division.grid, division.block, current_stream(), out.mutable_data_ptr<T>(),
                   norm.on_device<T>(), data_or_null<T>(added), division.part);
  });
  return out;
}

Pair batch_norm_grad_sums(const Tensor &grad, const Tensor &rows, const Optional &out, const Tensor &mean,
                          const Tensor &inverse_deviation, const Optional &weight, const Optional &bias, const Optional &factor,
                          Number ceiling) {
  const auto guard = on_device_of(rows, grad, mean, inverse_deviation, out.value_or(rows));
  const Norm norm(rows, mean, inverse_deviation, weight, bias, factor, ceiling);
  const Tensor grad_ = grad.contiguous(), out_ = out ? out->contiguous() : Tensor();
  check_like("grad", grad_, norm.rows);
  if (out) check_like("out", out_, norm.rows);
  Tensor masked = out ? at::empty_like(grad_) : at::empty({0}, grad_.options());
  const auto options = norm.mean.options();
  Tensor sums = rows.size(0) == 0 ? at::zeros({2, rows.size(1)}, options) : at::empty({2, rows.size(1)}, options);
  with_width({grad_, norm.rows, out_, masked}, [&](auto zero, auto width) {
    using T = decltype(zero);
    using S = Sum<T>;
    constexpr int V = decltype(width)::value;
    const int32_t channels = channels_of(grad_);
    const Division division(grad_.size(0), channels / V, kSumBlocks * multiprocessors());
    const Tensor partial = at::empty({division.grid.y, 2, channels}, options);
    SPARKME_LAUNCH((grad_sums<T, V>), division.grid, division.block, current_stream(),
                   out ? masked.mutable_data_ptr<T>() : nullptr, partial.mutable_data_ptr<S>(), norm.on_device<T>(),
                   grad_.const_data_ptr<T>(), data_or_null<T>(out_), division.part);
    SPARKME_LAUNCH((join_grad_sums<S>), join_grid(channels), dim3(32, 32), current_stream(), sums.mutable_data_ptr<S>(),
                   partial.const_data_ptr<S>(), norm.deviation.const_data_ptr<S>(), static_cast<int64_t>(division.grid.y),
                   channels);
  });
  return {masked, sums};
}

Tensor batch_norm_grad_rows(const Tensor &grad, const Tensor &rows, const Tensor &mean, const Tensor &inverse_deviation,
                            const Optional &weight, const Optional &bias, const Optional &factor, Number ceiling,
                            const Optional &sums, Number count) {
  const auto guard = on_device_of(rows, grad, mean, inverse_deviation, sums.value_or(mean));
  const Norm norm(rows, mean, inverse_deviation, weight, bias, factor, ceiling);
  const Tensor grad_ = grad.contiguous();
  check_like("grad", grad_, norm.rows);
  Tensor sums_;
  if (sums) {
    TORCH_CHECK_VALUE(sums->dim() == 2 && sums->size(0) == 2 && sums->size(1) == grad_.size(1), "sums must be (2, C), got ",
                      sums->sizes());
    sums_ = sums->to(sum_type(rows)).contiguous();
  }
  Tensor grad_rows = at::empty_like(norm.rows);
  const double per_row = 1 / std::max(1.0, count.value_or(static_cast<double>(grad_.size(0))));
  with_width({grad_rows, norm.rows, grad_}, [&](auto zero, auto width) {
    using T = decltype(zero);
    using S = Sum<T>;
    constexpr int V = decltype(width)::value;
    const Division division(grad_.size(0), grad_.size(1) / V, kGradBlocks * multiprocessors());
    SPARKME_LAUNCH((norm_grad_rows<T, V>), division.grid, division.block, current_stream(), grad_rows.mutable_data_ptr<T>(),
                   norm.on_device<T>(), grad_.const_data_ptr<T>(), data_or_null<S>(sums_), static_cast<S>(per_row),
                   division.part);
  });
  return grad_rows;
}

}  // namespace

TORCH_LIBRARY_IMPL(SPARKME_LIBRARY, SPARKME_KEY, m) {
  m.impl("batch_statistics", batch_statistics);
  m.impl("norm_statistics", norm_statistics);
  m.impl("batch_norm", batch_norm);
  m.impl("batch_norm_grad_sums", batch_norm_grad_sums);
  m.impl("batch_norm_grad_rows", batch_norm_grad_rows);
}

}  // namespace sparkme::cuda
