// Products of rows that lie anywhere, such as a convolution's: neither the rows nor the results are copied together. The matrix
// that they are multiplied with is, a panel at a time: as it lies, its rows may be a power of two apart, and then a cache holds
// few of them.
#include "vectors.inl"

#if defined(SPARKME_BF16_PAIRS)
#include <immintrin.h>
#endif

namespace sparkme {
namespace {

// A tile of sums that stays in registers: kTileRows rows of kTileVectors vectors.
constexpr int kTileRows = 6, kTileVectors = SPARKME_VECTOR_BYTES == 64 ? 4 : 2;

template <typename T>
constexpr int kLanes = VectorOf<Sum<T>, SPARKME_VECTOR_BYTES>::kLanes;

template <typename T>
constexpr int64_t kPanelColumns = kTileVectors * kLanes<T>;

// What one step of a product multiplies: kCount numbers of a row with as many of every column of a panel.
template <typename T>
struct Terms {
  static constexpr int kCount = 1;
  using Vector = typename VectorOf<T, SPARKME_VECTOR_BYTES>::Vector;

  static inline Vector read(const T *panel) { return load<T, SPARKME_VECTOR_BYTES>(panel); }
  static inline Vector spread(const T *numbers) { return Vector{} + *numbers; }
  static inline Vector add(Vector sum, Vector weights, Vector numbers) { return sum + weights * numbers; }
};

#if defined(SPARKME_BF16_PAIRS)
template <>
struct Terms<c10::BFloat16> {
  static constexpr int kCount = 2;
  using Vector = __m512i;

  static inline Vector read(const c10::BFloat16 *panel) { return _mm512_loadu_si512(panel); }
  static inline Vector spread(const c10::BFloat16 *numbers) {
    int32_t pair;
    std::memcpy(&pair, numbers, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static inline VectorOf<float, 64>::Vector add(VectorOf<float, 64>::Vector sum, Vector weights, Vector numbers) {
    return (VectorOf<float, 64>::Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)numbers);
  }
};
#else
template <>
struct Terms<c10::BFloat16> {
  static constexpr int kCount = 0;  // no such products
};
#endif

// Sums are made tile by tile, from zero, and then added: of thousands of terms one after the other the last digits would be
// lost.
template <typename T, int Bytes>
inline void add_to(T *target, typename VectorOf<T, Bytes>::Vector sum) {
  store<T, Bytes>(target, load<T, Bytes>(target) + sum);
}

// Calls body with 0 < value <= Most as a constant.
template <int Most, typename Body>
inline void with_constant(int64_t value, const Body &body) {
  if constexpr (Most > 0) {
    if (value == Most) {
      body(std::integral_constant<int, Most>());
    } else {
      with_constant<Most - 1>(value, body);
    }
  }
}

// targets (Rows, Vectors) += the sources' first `depth` numbers times the panel.
template <typename T, int Rows, int Vectors>
inline void multiply_tile(const T *const *sources, Sum<T> *const *targets, int64_t depth, const T *panel) {
  constexpr int kBytes = SPARKME_VECTOR_BYTES, kCount = Terms<T>::kCount;
  typename VectorOf<Sum<T>, kBytes>::Vector sum[Rows][Vectors] = {};
  for (int64_t k = 0; k < depth; k += kCount) {
    typename Terms<T>::Vector weights[Vectors];
    for (int v = 0; v < Vectors; ++v) weights[v] = Terms<T>::read(panel + k * Vectors * kLanes<T> + v * kLanes<T> * kCount);
    for (int r = 0; r < Rows; ++r) {
      const auto numbers = Terms<T>::spread(sources[r] + k);
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Terms<T>::add(sum[r][v], weights[v], numbers);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) add_to<Sum<T>, kBytes>(targets[r] + v * kLanes<T>, sum[r][v]);
}

template <typename T>
void multiply_rows(const T *const *sources, Sum<T> *const *targets, int64_t count, int64_t depth, const T *panel,
                   int64_t columns) {
  const int64_t vectors = (columns + kLanes<T> - 1) / kLanes<T>, whole = vectors * kLanes<T>;
  // A vector that is not full would be written past the end of a row.
  std::vector<Sum<T>> results(columns == whole ? 0 : count * whole, Sum<T>(0));
  std::vector<Sum<T> *> places(columns == whole ? 0 : count);
  for (size_t i = 0; i < places.size(); ++i) places[i] = results.data() + i * whole;
  Sum<T> *const *to = columns == whole ? targets : places.data();
  with_constant<kTileVectors>(vectors, [&](auto constant) {
    constexpr int kVectors = decltype(constant)::value;
    int64_t i = 0;
    for (; i + kTileRows <= count; i += kTileRows) multiply_tile<T, kTileRows, kVectors>(sources + i, to + i, depth, panel);
    with_constant<kTileRows - 1>(
        count - i, [&](auto rest) { multiply_tile<T, decltype(rest)::value, kVectors>(sources + i, to + i, depth, panel); });
  });
  for (size_t i = 0; i < places.size(); ++i)
    for (int64_t c = 0; c < columns; ++c) targets[i][c] += places[i][c];
}

// out = the numbers of `kCount` rows in turn.
template <typename T>
inline void interleave(const T *const *rows, int64_t count, T *out) {
  if constexpr (Terms<T>::kCount == 1) {
    std::copy_n(rows[0], count, out);
  } else {
    typedef uint16_t Half __attribute__((vector_size(32), aligned(1), may_alias));
    typedef uint32_t Pairs __attribute__((vector_size(64)));
    typedef uint32_t To __attribute__((vector_size(64), aligned(1), may_alias));
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const Pairs first = __builtin_convertvector(*reinterpret_cast<const Half *>(rows[0] + i), Pairs);
      const Pairs second = __builtin_convertvector(*reinterpret_cast<const Half *>(rows[1] + i), Pairs);
      *reinterpret_cast<To *>(out + 2 * i) = first | (second << 16);
    }
    for (; i < count; ++i) {
      out[2 * i] = rows[0][i];
      out[2 * i + 1] = rows[1][i];
    }
  }
}

// sums (Rows, Vectors), whose rows are `stride` apart, += the outer products of each pair's numbers, or = where they are the
// first. `numbers` and `panel` hold the pairs' left and right rows; numbers of the former are `apart`.
template <typename T, int Rows, int Vectors, typename Left>
inline void correlate_tile(const Left &left, const T *panel, int64_t steps, Sum<T> *sums, int64_t stride, bool first) {
  constexpr int kBytes = SPARKME_VECTOR_BYTES, kCount = Terms<T>::kCount;
  typename VectorOf<Sum<T>, kBytes>::Vector sum[Rows][Vectors] = {};
  for (int64_t i = 0; i < steps; ++i) {
    const T *numbers = left(i);
    typename Terms<T>::Vector values[Vectors];
    for (int v = 0; v < Vectors; ++v) values[v] = Terms<T>::read(panel + (i * Vectors + v) * kLanes<T> * kCount);
    for (int r = 0; r < Rows; ++r) {
      const auto number = Terms<T>::spread(numbers + r * kCount);
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Terms<T>::add(sum[r][v], values[v], number);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      Sum<T> *to = sums + r * stride + v * kLanes<T>;
      if (first) {
        store<Sum<T>, kBytes>(to, sum[r][v]);
      } else {
        add_to<Sum<T>, kBytes>(to, sum[r][v]);
      }
    }
  }
}

template <typename T>
void correlate_rows(const T *const *lefts, const T *const *rights, int64_t count, int64_t left, int64_t depth, int64_t columns,
                    Sum<T> *sums, int64_t stride, bool first) {
  constexpr int kCount = Terms<T>::kCount;
  const int64_t steps = (count + kCount - 1) / kCount, apart = depth * kCount;
  const std::vector<T> none(kCount == 1 ? 0 : std::max(left + depth, columns), T(0));
  // The rows of one step; where their number is odd, zeros with the last.
  const auto rows_of = [&](const T *const *rows, int64_t step, int64_t offset, const T **found) {
    for (int i = 0; i < kCount; ++i)
      found[i] = step * kCount + i < count ? rows[step * kCount + i] + offset : none.data() + offset;
  };
  std::vector<T> pairs(kCount == 1 ? 0 : steps * apart), panel(steps * kCount * kPanelColumns<T>);
  const T *found[2];
  if constexpr (kCount > 1) {
    for (int64_t i = 0; i < steps; ++i) {
      rows_of(lefts, i, left, found);
      interleave(found, depth, pairs.data() + i * apart);
    }
  }
  std::vector<Sum<T>> results;
  for (int64_t c = 0; c < columns; c += kPanelColumns<T>) {
    const int64_t width = std::min(kPanelColumns<T>, columns - c), vectors = (width + kLanes<T> - 1) / kLanes<T>;
    const int64_t whole = vectors * kLanes<T>;
    if (width < whole) {  // the last vector would be written past the end of a row
      std::fill(panel.begin(), panel.end(), T(0));
      results.resize(depth * whole);
    }
    for (int64_t i = 0; i < steps; ++i) {
      rows_of(rights, i, c, found);
      interleave(found, width, panel.data() + i * whole * kCount);
    }
    Sum<T> *const to = width < whole ? results.data() : sums + c;
    const int64_t to_stride = width < whole ? whole : stride;
    const bool replaced = width < whole || first;
    with_constant<kTileVectors>(vectors, [&](auto constant) {
      constexpr int kVectors = decltype(constant)::value;
      const auto tile = [&](auto rows, int64_t k) {
        const auto numbers = [&](int64_t i) {
          if constexpr (kCount == 1) {
            return lefts[i] + left + k;
          } else {
            return pairs.data() + i * apart + k * kCount;
          }
        };
        correlate_tile<T, decltype(rows)::value, kVectors>(numbers, panel.data(), steps, to + k * to_stride, to_stride,
                                                           replaced);
      };
      int64_t k = 0;
      for (; k + kTileRows <= depth; k += kTileRows) tile(std::integral_constant<int, kTileRows>(), k);
      with_constant<kTileRows - 1>(depth - k, [&](auto rest) { tile(rest, k); });
    });
    if (to != results.data()) continue;
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t x = 0; x < width; ++x) {
        Sum<T> &sum = sums[k * stride + c + x];
        sum = (first ? Sum<T>(0) : sum) + to[k * whole + x];
      }
  }
}

template <typename T>
void round_numbers(const Sum<T> *numbers, int64_t count, T *out) {
  for_channels<T>(count, [&](int64_t i, auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    store<T, kBytes>(out + i, load<Sum<T>, kBytes>(numbers + i));
  });
}

// The numbers of a and b in turn, from a's first or from its middle on.
template <typename Vector, int... Lane>
inline Vector mixed(Vector a, Vector b, int half, std::integer_sequence<int, Lane...>) {
  constexpr int kCount = sizeof...(Lane);
#if defined(__clang__)
  return half ? __builtin_shufflevector(a, b, (kCount / 2 + Lane / 2 + Lane % 2 * kCount)...)
              : __builtin_shufflevector(a, b, (Lane / 2 + Lane % 2 * kCount)...);
#else
  return half ? __builtin_shuffle(a, b, Vector{(kCount / 2 + Lane / 2 + Lane % 2 * kCount)...})
              : __builtin_shuffle(a, b, Vector{(Lane / 2 + Lane % 2 * kCount)...});
#endif
}

// A square of numbers turned over: each round, of log2(side), puts two vectors' numbers in turn.
template <typename T>
struct Square {
  static constexpr int kBytes = std::min<int>(SPARKME_VECTOR_BYTES, 16 * sizeof(T)), kSide = kBytes / sizeof(T);
  typedef BitsOf<T> Vector __attribute__((vector_size(kBytes)));
  typedef BitsOf<T> Unaligned __attribute__((vector_size(kBytes), aligned(1), may_alias));

  static inline void transpose(const T *rows, int64_t stride, T *out, int64_t out_stride) {
    Vector square[kSide], next[kSide];
    for (int r = 0; r < kSide; ++r) square[r] = *reinterpret_cast<const Unaligned *>(rows + r * stride);
    for (int round = 1; round < kSide; round *= 2) {
      for (int r = 0; r < kSide; ++r)
        next[r] = mixed(square[r / 2], square[r / 2 + kSide / 2], r % 2, std::make_integer_sequence<int, kSide>());
      for (int r = 0; r < kSide; ++r) square[r] = next[r];
    }
    for (int r = 0; r < kSide; ++r) *reinterpret_cast<Unaligned *>(out + r * out_stride) = square[r];
  }
};

template <typename T>
void transpose(const T *rows, int64_t stride, int64_t count, int64_t channels, T *out, int64_t out_stride) {
  constexpr int64_t kSide = Square<T>::kSide;
  for (int64_t n = 0; n < count; n += kSide) {
    const int64_t height = std::min(kSide, count - n);
    int64_t c = 0;
    if (height == kSide)
      for (; c + kSide <= channels; c += kSide)
        Square<T>::transpose(rows + n * stride + c, stride, out + c * out_stride + n, out_stride);
    for (; c < channels; ++c)
      for (int64_t y = 0; y < height; ++y) out[c * out_stride + n + y] = rows[(n + y) * stride + c];
  }
}

template <typename T>
void pack(const T *matrix, int64_t stride, bool transposed, int64_t depth, int64_t columns, T *panel) {
  constexpr int kCount = Terms<T>::kCount;
  const int64_t whole = (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  if (columns < whole) std::fill_n(panel, depth * whole, T(0));
  if (transposed) {
    typedef std::conditional_t<sizeof(T) * kCount == 8, uint64_t, uint32_t> Step __attribute__((may_alias));
    transpose(reinterpret_cast<const Step *>(matrix), stride / kCount, columns, depth / kCount, reinterpret_cast<Step *>(panel),
              whole);
  } else {
    for (int64_t k = 0; k < depth; k += kCount) {
      const T *rows[2] = {matrix + k * stride, matrix + (k + 1) * stride};
      interleave(rows, columns, panel + k * whole);
    }
  }
}

}  // namespace
}  // namespace sparkme
