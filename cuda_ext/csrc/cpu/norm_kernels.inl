// The inner loops of batch norm and what is done with it; see kernels.h for what they compute.
#include "vectors.inl"

namespace sparkme {
namespace {

// Sums go over rows as they lie; the sums themselves stay in the cache.
template <typename A, int Bytes>
inline void add(A *sums, typename VectorOf<A, Bytes>::Vector value) {
  store<A, Bytes>(sums, load<A, Bytes>(sums) + value);
}

// x within [0, ceiling]; NaN stays.
template <typename V, typename A>
inline V clamped(V x, A ceiling) {
  x = x < V{} ? V{} : x;
  return x > V{} + ceiling ? V{} + ceiling : x;
}

// The gradient where the result was neither clamped.
template <typename V, typename A>
inline V where_inside(V y, A ceiling, V grad) {
  grad = y > V{} ? grad : V{};
  return y < V{} + ceiling ? grad : V{};
}

template <typename T>
void statistics(const T *rows, int64_t count, int64_t channels, Sum<T> *sums) {
  std::memset(sums, 0, 2 * channels * sizeof(Sum<T>));
  for (int64_t row = 1; row < count; ++row) {
    for_channels<T>(channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      const auto x = load<T, kBytes>(rows + row * channels + c) - load<T, kBytes>(rows + c);
      add<Sum<T>, kBytes>(sums + c, x);
      add<Sum<T>, kBytes>(sums + channels + c, x * x);
    });
  }
}

// y of one row's channels from c on.
template <typename T, int Bytes>
inline auto normalised(const NormRows<T> &x, int64_t row, int64_t c, const T *residual) {
  const auto value =
      load<T, Bytes>(x.rows + row * x.channels + c) * load<Sum<T>, Bytes>(x.scale + c) + load<Sum<T>, Bytes>(x.shift + c);
  const auto scaled = x.factors ? value * x.factors[row] : value;
  return residual ? scaled + load<T, Bytes>(residual + row * x.channels + c) : scaled;
}

template <typename T>
void normalise(const NormRows<T> &x, const T *residual, T *out) {
  const bool clamps = x.ceiling == x.ceiling;
  for (int64_t row = 0; row < x.count; ++row) {
    for_channels<T>(x.channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      const auto y = normalised<T, kBytes>(x, row, c, residual);
      store<T, kBytes>(out + row * x.channels + c, clamps ? clamped(y, x.ceiling) : y);
    });
  }
}

// The gradient where y was not clamped.
template <typename T, int Bytes>
inline auto masked_grad(const NormRows<T> &x, const T *grad, const T *out, int64_t row, int64_t c) {
  const auto g = load<T, Bytes>(grad + row * x.channels + c);
  if (x.ceiling != x.ceiling) return g;
  const auto y = out ? load<T, Bytes>(out + row * x.channels + c) : normalised<T, Bytes>(x, row, c, nullptr);
  return where_inside(y, x.ceiling, g);
}

template <typename T>
void norm_grad_sums(const NormRows<T> &x, const T *grad, const T *out, const Sum<T> *mean, Sum<T> *sums, T *masked) {
  std::memset(sums, 0, 2 * x.channels * sizeof(Sum<T>));
  for (int64_t row = 0; row < x.count; ++row) {
    for_channels<T>(x.channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      const auto g = masked_grad<T, kBytes>(x, grad, out, row, c);
      if (masked) store<T, kBytes>(masked + row * x.channels + c, g);
      const auto scaled = x.factors ? g * x.factors[row] : g;
      const auto centred = load<T, kBytes>(x.rows + row * x.channels + c) - load<Sum<T>, kBytes>(mean + c);
      add<Sum<T>, kBytes>(sums + c, scaled);
      add<Sum<T>, kBytes>(sums + x.channels + c, scaled * centred);
    });
  }
}

template <typename T>
void norm_grad_rows(const NormRows<T> &x, const T *grad, const Sum<T> *mean, const Sum<T> *by_grad, const Sum<T> *by_row,
                    const Sum<T> *constant, T *grad_rows) {
  for (int64_t row = 0; row < x.count; ++row) {
    for_channels<T>(x.channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      const auto g = masked_grad<T, kBytes>(x, grad, nullptr, row, c);
      const auto scaled = x.factors ? g * x.factors[row] : g;
      const auto centred = load<T, kBytes>(x.rows + row * x.channels + c) - load<Sum<T>, kBytes>(mean + c);
      store<T, kBytes>(grad_rows + row * x.channels + c, load<Sum<T>, kBytes>(by_grad + c) * scaled +
                                                             load<Sum<T>, kBytes>(by_row + c) * centred +
                                                             load<Sum<T>, kBytes>(constant + c));
    });
  }
}

template <typename T>
void masked_sums(const T *grad, const T *out, Sum<T> ceiling, const Sum<T> *factors, int64_t count, int64_t channels,
                 Sum<T> *sums, T *masked) {
  std::memset(sums, 0, channels * sizeof(Sum<T>));
  for (int64_t row = 0; row < count; ++row) {
    for_channels<T>(channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      auto g = load<T, kBytes>(grad + row * channels + c);
      if (out) {
        g = where_inside(load<T, kBytes>(out + row * channels + c), ceiling, g);
        store<T, kBytes>(masked + row * channels + c, g);
      }
      add<Sum<T>, kBytes>(sums + c, factors ? g * factors[row] : g);
    });
  }
}

// The sum of body(c, tag) over the channels.
template <typename T, typename Body>
inline Sum<T> sum_over(int64_t channels, const Body &body) {
  constexpr int kBytes = SPARKME_VECTOR_BYTES, kLanes = VectorOf<Sum<T>, kBytes>::kLanes;
  typename VectorOf<Sum<T>, kBytes>::Vector sums = {};
  Sum<T> sum = 0;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) sums += body(c, std::integral_constant<int, kBytes>());
  for (; c < channels; ++c) sum += body(c, std::integral_constant<int, 0>());
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

template <typename T>
void layer_norm(const T *rows, int64_t count, int64_t channels, const Sum<T> *weight, const Sum<T> *bias, Sum<T> epsilon,
                T *out, Sum<T> *statistics) {
  for (int64_t row = 0; row < count; ++row, rows += channels, out += channels) {
    const Sum<T> mean =
        sum_over<T>(channels, [&](int64_t c, auto bytes) { return load<T, decltype(bytes)::value>(rows + c); }) / channels;
    const Sum<T> squares = sum_over<T>(channels, [&](int64_t c, auto bytes) {
      const auto x = load<T, decltype(bytes)::value>(rows + c) - mean;
      return x * x;
    });
    const Sum<T> deviation = 1 / std::sqrt(squares / channels + epsilon);
    for_channels<T>(channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      store<T, kBytes>(out + c, (load<T, kBytes>(rows + c) - mean) * deviation * load<Sum<T>, kBytes>(weight + c) +
                                    load<Sum<T>, kBytes>(bias + c));
    });
    statistics[2 * row] = mean;
    statistics[2 * row + 1] = deviation;
  }
}

template <typename T>
void layer_norm_grad(const T *grad, const T *rows, int64_t count, int64_t channels, const Sum<T> *weight,
                     const Sum<T> *statistics, T *grad_rows, Sum<T> *sums) {
  std::memset(sums, 0, 2 * channels * sizeof(Sum<T>));
  for (int64_t row = 0; row < count; ++row, grad += channels, rows += channels, grad_rows += channels) {
    const Sum<T> mean = statistics[2 * row], deviation = statistics[2 * row + 1];
    const Sum<T> sum = sum_over<T>(channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      return load<T, kBytes>(grad + c) * load<Sum<T>, kBytes>(weight + c);
    });
    const Sum<T> products = sum_over<T>(channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      return load<T, kBytes>(grad + c) * load<Sum<T>, kBytes>(weight + c) * (load<T, kBytes>(rows + c) - mean);
    });
    const Sum<T> constant = sum / channels, slope = products * deviation * deviation / channels;
    for_channels<T>(channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      const auto g = load<T, kBytes>(grad + c), x = load<T, kBytes>(rows + c) - mean;
      store<T, kBytes>(grad_rows + c, (g * load<Sum<T>, kBytes>(weight + c) - constant - x * slope) * deviation);
      add<Sum<T>, kBytes>(sums + c, g);
      add<Sum<T>, kBytes>(sums + channels + c, g * x * deviation);
    });
  }
}

}  // namespace
}  // namespace sparkme
