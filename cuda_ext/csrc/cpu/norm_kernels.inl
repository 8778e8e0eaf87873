// The inner loops of batch norm and what is done with it; see kernels.h for what they compute.
#include "vectors.inl"

namespace sparkme {
namespace {

constexpr int kRowsAtOnce = 8;  // of sums: they stay in registers meanwhile

// The larger of x and zero; NaN stays.
template <typename V>
inline V positive(V x) {
  return x < V{} ? V{} : x;
}

template <typename T>
void statistics(const T *rows, int64_t count, int64_t channels, Sum<T> *sums) {
  std::memset(sums, 0, 2 * channels * sizeof(Sum<T>));
  for (int64_t first = 0; first < count; first += kRowsAtOnce) {
    const int64_t end = std::min<int64_t>(count, first + kRowsAtOnce);
    for_channels<T>(channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      const auto origin = load<T, kBytes>(rows + c);
      auto sum = load<Sum<T>, kBytes>(sums + c), squares = load<Sum<T>, kBytes>(sums + channels + c);
      for (int64_t row = first; row < end; ++row) {
        const auto x = load<T, kBytes>(rows + row * channels + c) - origin;
        sum += x;
        squares += x * x;
      }
      store<Sum<T>, kBytes>(sums + c, sum);
      store<Sum<T>, kBytes>(sums + channels + c, squares);
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
  for (int64_t row = 0; row < x.count; ++row) {
    for_channels<T>(x.channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      const auto y = normalised<T, kBytes>(x, row, c, residual);
      store<T, kBytes>(out + row * x.channels + c, x.relu ? positive(y) : y);
    });
  }
}

// The gradient where y was positive. Of `out` only the sign is read.
template <typename T, int Bytes>
inline auto masked_grad(const NormRows<T> &x, const T *grad, const T *out, int64_t row, int64_t c) {
  const auto g = load<T, Bytes>(grad + row * x.channels + c);
  if (!x.relu) return g;
  const auto y = out ? load<T, Bytes>(out + row * x.channels + c) : normalised<T, Bytes>(x, row, c, nullptr);
  return y > decltype(y){} ? g : decltype(y){};
}

template <typename T>
void norm_grad_sums(const NormRows<T> &x, const T *grad, const T *out, const Sum<T> *mean, Sum<T> *sums, T *masked) {
  std::memset(sums, 0, 2 * x.channels * sizeof(Sum<T>));
  for (int64_t first = 0; first < x.count; first += kRowsAtOnce) {
    const int64_t end = std::min<int64_t>(x.count, first + kRowsAtOnce);
    for_channels<T>(x.channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      const auto centre = load<Sum<T>, kBytes>(mean + c);
      auto sum = load<Sum<T>, kBytes>(sums + c), products = load<Sum<T>, kBytes>(sums + x.channels + c);
      for (int64_t row = first; row < end; ++row) {
        const auto g = masked_grad<T, kBytes>(x, grad, out, row, c);
        if (masked) store<T, kBytes>(masked + row * x.channels + c, g);
        const auto scaled = x.factors ? g * x.factors[row] : g;
        sum += scaled;
        products += scaled * (load<T, kBytes>(x.rows + row * x.channels + c) - centre);
      }
      store<Sum<T>, kBytes>(sums + c, sum);
      store<Sum<T>, kBytes>(sums + x.channels + c, products);
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
void masked_sums(const T *grad, const T *out, const Sum<T> *factors, int64_t count, int64_t channels, Sum<T> *sums, T *masked) {
  std::memset(sums, 0, channels * sizeof(Sum<T>));
  for (int64_t first = 0; first < count; first += kRowsAtOnce) {
    const int64_t end = std::min<int64_t>(count, first + kRowsAtOnce);
    for_channels<T>(channels, [&](int64_t c, auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      auto sum = load<Sum<T>, kBytes>(sums + c);
      for (int64_t row = first; row < end; ++row) {
        auto g = load<T, kBytes>(grad + row * channels + c);
        if (out) {
          g = load<T, kBytes>(out + row * channels + c) > decltype(g){} ? g : decltype(g){};
          store<T, kBytes>(masked + row * channels + c, g);
        }
        sum += factors ? g * factors[row] : g;
      }
      store<Sum<T>, kBytes>(sums + c, sum);
    });
  }
}

}  // namespace
}  // namespace sparkme
