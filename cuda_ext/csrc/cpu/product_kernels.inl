// Products of rows that lie anywhere, such as a convolution's: neither the rows nor the results are copied together. The matrix
// that they are multiplied with is, a panel at a time: as it lies, its rows may be a power of two apart, and then a cache holds
// few of them.
#include "vectors.inl"

namespace sparkme {
namespace {

// A tile of sums that stays in registers: kTileRows rows of kTileVectors vectors.
constexpr int kTileRows = 6, kTileVectors = SPARKME_VECTOR_BYTES == 64 ? 4 : 2;

template <typename T>
constexpr int kLanes = VectorOf<Sum<T>, SPARKME_VECTOR_BYTES>::kLanes;

template <typename T>
constexpr int64_t kPanelColumns = kTileVectors * kLanes<T>;

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
inline void multiply_tile(const T *const *sources, T *const *targets, int64_t depth, const T *panel) {
  constexpr int kBytes = SPARKME_VECTOR_BYTES;
  using V = VectorOf<T, kBytes>;
  typename V::Vector sum[Rows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    typename V::Vector weights[Vectors];
    for (int v = 0; v < Vectors; ++v) weights[v] = load<T, kBytes>(panel + (k * Vectors + v) * V::kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] += weights[v] * sources[r][k];
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) add_to<T, kBytes>(targets[r] + v * V::kLanes, sum[r][v]);
}

template <typename T>
void multiply_rows(const T *const *sources, T *const *targets, int64_t count, int64_t depth, const T *panel, int64_t columns) {
  const int64_t vectors = (columns + kLanes<T> - 1) / kLanes<T>, whole = vectors * kLanes<T>;
  // A vector that is not full would be written past the end of a row.
  std::vector<T> results(columns == whole ? 0 : count * whole, T(0));
  std::vector<T *> places(columns == whole ? 0 : count);
  for (size_t i = 0; i < places.size(); ++i) places[i] = results.data() + i * whole;
  T *const *to = columns == whole ? targets : places.data();
  with_constant<kTileVectors>(vectors, [&](auto constant) {
    constexpr int kVectors = decltype(constant)::value;
    int64_t i = 0;
    for (; i + kTileRows <= count; i += kTileRows)
      multiply_tile<T, kTileRows, kVectors>(sources + i, to + i, depth, panel);
    with_constant<kTileRows - 1>(count - i, [&](auto rest) {
      multiply_tile<T, decltype(rest)::value, kVectors>(sources + i, to + i, depth, panel);
    });
  });
  for (size_t i = 0; i < places.size(); ++i)
    for (int64_t c = 0; c < columns; ++c) targets[i][c] += places[i][c];
}

// sums (Rows, Vectors), whose rows are `stride` apart, += the outer products of each pair's numbers, or = where they are the
// first.
template <typename T, int Rows, int Vectors>
inline void correlate_tile(const T *const *lefts, const T *panel, int64_t count, int64_t left, T *sums, int64_t stride,
                           bool first) {
  constexpr int kBytes = SPARKME_VECTOR_BYTES;
  using V = VectorOf<T, kBytes>;
  typename V::Vector sum[Rows][Vectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    const T *numbers = lefts[i] + left;
    typename V::Vector values[Vectors];
    for (int v = 0; v < Vectors; ++v) values[v] = load<T, kBytes>(panel + (i * Vectors + v) * V::kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] += values[v] * numbers[r];
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      T *to = sums + r * stride + v * V::kLanes;
      if (first) {
        store<T, kBytes>(to, sum[r][v]);
      } else {
        add_to<T, kBytes>(to, sum[r][v]);
      }
    }
  }
}

template <typename T>
void correlate_rows(const T *const *lefts, const T *const *rights, int64_t count, int64_t left, int64_t depth, int64_t columns,
                    T *sums, int64_t stride, bool first) {
  std::vector<T> panel(count * kPanelColumns<T>), results;
  for (int64_t c = 0; c < columns; c += kPanelColumns<T>) {
    const int64_t width = std::min(kPanelColumns<T>, columns - c), vectors = (width + kLanes<T> - 1) / kLanes<T>;
    const int64_t whole = vectors * kLanes<T>;
    if (width < whole) {  // the last vector would be written past the end of a row
      std::fill(panel.begin(), panel.end(), T(0));
      results.resize(depth * whole);
    }
    for (int64_t i = 0; i < count; ++i) std::copy_n(rights[i] + c, width, panel.data() + i * whole);
    T *const to = width < whole ? results.data() : sums + c;
    const int64_t apart = width < whole ? whole : stride;
    const bool replaced = width < whole || first;
    with_constant<kTileVectors>(vectors, [&](auto constant) {
      constexpr int kVectors = decltype(constant)::value;
      int64_t k = 0;
      for (; k + kTileRows <= depth; k += kTileRows)
        correlate_tile<T, kTileRows, kVectors>(lefts, panel.data(), count, left + k, to + k * apart, apart, replaced);
      with_constant<kTileRows - 1>(depth - k, [&](auto rest) {
        correlate_tile<T, decltype(rest)::value, kVectors>(lefts, panel.data(), count, left + k, to + k * apart, apart,
                                                           replaced);
      });
    });
    if (to != results.data()) continue;
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t x = 0; x < width; ++x) sums[k * stride + c + x] = (first ? T(0) : sums[k * stride + c + x]) + to[k * whole + x];
  }
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
  const int64_t whole = (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  if (columns < whole) std::fill_n(panel, depth * whole, T(0));
  if (transposed) {
    transpose(matrix, stride, columns, depth, panel, whole);
  } else {
    for (int64_t k = 0; k < depth; ++k) std::copy_n(matrix + k * stride, columns, panel + k * whole);
  }
}

}  // namespace
}  // namespace sparkme
