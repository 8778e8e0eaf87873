// The vectors that the kernels are written with: the compiler's own extension, so their arithmetic is written once. Included by
// one source file per instruction set, which defines SPARKME_VECTOR_BYTES.
#pragma once

namespace sparkme {
namespace {

// The unsigned integer of T's size.
template <typename T>
using BitsOf = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <typename A, int Bytes>
struct VectorOf {
  typedef A Vector __attribute__((vector_size(Bytes)));
  typedef A Unaligned __attribute__((vector_size(Bytes), aligned(1), may_alias));
  typedef uint16_t Half __attribute__((vector_size(Bytes / 2), aligned(1), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(Bytes)));
  static constexpr int kLanes = Bytes / sizeof(A);
};

template <typename A>
struct VectorOf<A, 0> {  // what is left over of the channels, one by one
  typedef A Vector;
  static constexpr int kLanes = 1;
};

template <typename T, int Bytes>
inline typename VectorOf<Sum<T>, Bytes>::Vector load(const T *from) {
  using V = VectorOf<Sum<T>, Bytes>;
  if constexpr (Bytes == 0) {
    return static_cast<Sum<T>>(*from);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto half = *reinterpret_cast<const typename V::Half *>(from);
    return reinterpret_cast<typename V::Vector>(__builtin_convertvector(half, typename V::Bits) << 16);
  } else {
    return *reinterpret_cast<const typename V::Unaligned *>(from);
  }
}

template <typename T, int Bytes>
inline void store(T *to, typename VectorOf<Sum<T>, Bytes>::Vector value) {
  using V = VectorOf<Sum<T>, Bytes>;
  if constexpr (Bytes == 0) {
    *to = static_cast<T>(value);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    typename V::Bits bits = reinterpret_cast<typename V::Bits>(value);
    bits = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : typename V::Bits{} + 0x7fc0;  // to nearest even; NaN
    *reinterpret_cast<typename V::Half *>(to) = __builtin_convertvector(bits, typename V::Half);
  } else {
    *reinterpret_cast<typename V::Unaligned *>(to) = value;
  }
}

// Calls body(c, tag) for all channels, a vector at a time, then perhaps half of one, and then one by one; the tag holds the
// bytes.
template <typename T, typename Body>
inline void for_channels(int64_t channels, const Body &body) {
  constexpr int kBytes = SPARKME_VECTOR_BYTES, kLanes = VectorOf<Sum<T>, kBytes>::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(c, std::integral_constant<int, kBytes>());
  if constexpr (kLanes > 4) {
    if (c + kLanes / 2 <= channels) {
      body(c, std::integral_constant<int, kBytes / 2>());
      c += kLanes / 2;
    }
  }
  for (; c < channels; ++c) body(c, std::integral_constant<int, 0>());
}

}  // namespace
}  // namespace sparkme
