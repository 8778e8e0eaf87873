// GELU and its derivative, x Phi(x) and Phi(x) + x phi(x), with the normal distribution Phi and its density phi.
#include "vectors.inl"

namespace sparkme {
namespace {

// exp(x) for x <= 0, of float vectors: a power of two times a polynomial (Taylor's, of degree 6) in what is left of x.
template <typename V>
inline typename V::Vector exp_of_negative(typename V::Vector x) {
  using Vector = typename V::Vector;
  typedef int32_t Integers __attribute__((vector_size(sizeof(Vector))));
  x = x < -87.0f ? Vector{} - 87.0f : x;
  const Integers power = __builtin_convertvector(x * 1.44269504f - 0.5f, Integers);  // rounds, since x is negative
  const Vector whole = __builtin_convertvector(power, Vector);
  const Vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector sum = r * (1.0f / 720) + 1.0f / 120;
  for (const float factor : {1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + factor;
  return sum * reinterpret_cast<Vector>((power + 127) << 23);
}

// Phi(x), and phi(x) in `density`. Of float vectors by formula 7.1.26 of Abramowitz and Stegun, off by less than 1e-7.
template <typename T, int Bytes>
inline auto normal_distribution(typename VectorOf<Sum<T>, Bytes>::Vector x, typename VectorOf<Sum<T>, Bytes>::Vector &density) {
  constexpr double kDensity = 0.39894228040143267794;  // 1 / sqrt(2 pi)
  if constexpr (Bytes == 0 || std::is_same_v<T, double>) {
    if constexpr (Bytes == 0) {
      density = std::exp(-x * x / 2) * kDensity;
      return static_cast<Sum<T>>(std::erfc(-x / std::sqrt(Sum<T>(2))) / 2);
    } else {
      typename VectorOf<Sum<T>, Bytes>::Vector out;
      for (int i = 0; i < VectorOf<Sum<T>, Bytes>::kLanes; ++i) {
        density[i] = std::exp(-x[i] * x[i] / 2) * kDensity;
        out[i] = std::erfc(-x[i] / std::sqrt(2.0)) / 2;
      }
      return out;
    }
  } else {
    using V = VectorOf<Sum<T>, Bytes>;
    using Vector = typename V::Vector;
    const Vector tail = exp_of_negative<V>(x * x * -0.5f);
    density = tail * static_cast<float>(kDensity);
    const Vector size = x < 0.0f ? -x : x;
    const Vector t = 1.0f / (1.0f + size * (0.3275911f * 0.70710678f));
    Vector sum = t * 1.061405429f - 1.453152027f;
    for (const float factor : {1.421413741f, -0.284496736f, 0.254829592f, 0.0f}) sum = sum * t + factor;
    const Vector outside = sum * tail * 0.5f;  // what the distribution has beyond |x|
    return x < 0.0f ? outside : 1.0f - outside;
  }
}

template <typename T>
void gelu(const T *x, int64_t count, T *out) {
  for_channels<T>(count, [&](int64_t i, auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    const auto value = load<T, kBytes>(x + i);
    auto density = value;
    store<T, kBytes>(out + i, value * normal_distribution<T, kBytes>(value, density));
  });
}

template <typename T>
void gelu_with_grad(const T *x, int64_t count, T *out, T *grad) {
  for_channels<T>(count, [&](int64_t i, auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    const auto value = load<T, kBytes>(x + i);
    auto density = value;
    const auto distribution = normal_distribution<T, kBytes>(value, density);
    store<T, kBytes>(out + i, value * distribution);
    store<T, kBytes>(grad + i, load<T, kBytes>(grad + i) * (distribution + value * density));
  });
}

template <typename T>
Sum<T> dot_and_scale(const T *x, int64_t count, Sum<T> scale, Sum<T> *grad) {
  constexpr int kBytes = SPARKME_VECTOR_BYTES, kCount = VectorOf<Sum<T>, kBytes>::kLanes;
  typename VectorOf<Sum<T>, kBytes>::Vector sums = {};
  int64_t i = 0;
  for (; i + kCount <= count; i += kCount) {
    const auto g = load<Sum<T>, kBytes>(grad + i);
    sums += load<T, kBytes>(x + i) * g;
    store<Sum<T>, kBytes>(grad + i, g * scale);
  }
  Sum<T> sum = 0;
  for (int k = 0; k < kCount; ++k) sum += sums[k];
  for (; i < count; ++i) {
    sum += static_cast<Sum<T>>(x[i]) * grad[i];
    grad[i] *= scale;
  }
  return sum;
}

}  // namespace
}  // namespace sparkme
