// The inner loop of max pooling's gradient; see kernels.h for what it computes.
#include "vectors.inl"

namespace sparkme {
namespace {

template <typename T>
void sum_taken(const T *const *rows, const uint8_t *const *taken, const uint8_t *taps, int64_t count, int64_t channels,
               T *out) {
  for_channels<T>(channels, [&](int64_t c, auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    using V = VectorOf<Sum<T>, kBytes>;
    typename V::Vector sum = {};
    for (int64_t i = 0; i < count; ++i) {
      const auto row = load<T, kBytes>(rows[i] + c);
      if constexpr (kBytes == 0) {
        sum += taken[i][c] == taps[i] ? row : 0;
      } else {
        typedef uint8_t Taken __attribute__((vector_size(V::kLanes), aligned(1), may_alias));
        typedef BitsOf<Sum<T>> Bits __attribute__((vector_size(kBytes)));
        const Bits from = __builtin_convertvector(*reinterpret_cast<const Taken *>(taken[i] + c), Bits);
        sum += from == Bits{} + taps[i] ? row : typename V::Vector{};
      }
    }
    store<T, kBytes>(out + c, sum);
  });
}

}  // namespace
}  // namespace sparkme
