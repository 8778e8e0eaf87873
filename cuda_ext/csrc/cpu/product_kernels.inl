// Products of rows that lie anywhere, such as a convolution's: neither the rows nor the results are copied together.
#include "vectors.inl"

namespace sparkme {
namespace {

// A tile of sums that stays in registers: kTileRows rows of kTileVectors vectors.
constexpr int kTileRows = 6, kTileVectors = SPARKME_VECTOR_BYTES == 64 ? 4 : 2;

template <typename T>
constexpr int64_t kTileColumns = kTileVectors * VectorOf<Sum<T>, SPARKME_VECTOR_BYTES>::kLanes;

// Sums are made tile by tile, from zero, and then added: of thousands of terms one after the other the last digits would be
// lost.
template <typename T, int Bytes>
inline void add_to(T *target, typename VectorOf<T, Bytes>::Vector sum) {
  store<T, Bytes>(target, load<T, Bytes>(target) + sum);
}

// tile (Rows, Vectors) += the rows' first `depth` numbers times the panel (depth, ...), whose rows are `stride` apart.
template <typename T, int Rows, int Vectors>
inline void multiply_tile(const T *const *sources, T *const *targets, int64_t depth, const T *panel, int64_t stride) {
  constexpr int kBytes = SPARKME_VECTOR_BYTES;
  using V = VectorOf<T, kBytes>;
  typename V::Vector sum[Rows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    typename V::Vector weights[Vectors];
    for (int v = 0; v < Vectors; ++v) weights[v] = load<T, kBytes>(panel + k * stride + v * V::kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] += weights[v] * sources[r][k];
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) add_to<T, kBytes>(targets[r] + v * V::kLanes, sum[r][v]);
}

// The same for one tile's worth of columns and any number of rows.
template <typename T, int Vectors>
void multiply_columns(const T *const *sources, T *const *targets, int64_t count, int64_t depth, const T *panel,
                      int64_t stride) {
  int64_t i = 0;
  for (; i + kTileRows <= count; i += kTileRows)
    multiply_tile<T, kTileRows, Vectors>(sources + i, targets + i, depth, panel, stride);
  for (; i < count; ++i) multiply_tile<T, 1, Vectors>(sources + i, targets + i, depth, panel, stride);
}

template <typename T>
void multiply_rows(const T *const *sources, T *const *targets, int64_t count, int64_t depth, const T *kernel, int64_t columns) {
  constexpr int kLanes = VectorOf<T, SPARKME_VECTOR_BYTES>::kLanes;
  std::vector<T *> shifted(targets, targets + count);
  int64_t c = 0;
  const auto advance = [&](int64_t by) {
    c += by;
    for (T *&target : shifted) target += by;
  };
  for (; c + kTileColumns<T> <= columns; advance(kTileColumns<T>))
    multiply_columns<T, kTileVectors>(sources, shifted.data(), count, depth, kernel + c, columns);
  for (; c + kLanes <= columns; advance(kLanes))
    multiply_columns<T, 1>(sources, shifted.data(), count, depth, kernel + c, columns);
  if (c == columns) return;
  // What is left over is less than a vector: with zeros behind it, and its results through a copy.
  const int64_t rest = columns - c;
  std::vector<T> panel(depth * kLanes, T(0)), results(count * kLanes, T(0));
  for (int64_t k = 0; k < depth; ++k) std::copy_n(kernel + k * columns + c, rest, panel.data() + k * kLanes);
  std::vector<T *> places(count);
  for (int64_t i = 0; i < count; ++i) places[i] = results.data() + i * kLanes;
  multiply_columns<T, 1>(sources, places.data(), count, depth, panel.data(), kLanes);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t x = 0; x < rest; ++x) shifted[i][x] += places[i][x];
}

// sums (Rows, Vectors), whose rows are `stride` apart, += the outer products of each pair's numbers.
template <typename T, int Rows, int Vectors>
inline void correlate_tile(const T *const *lefts, const T *const *rights, int64_t count, int64_t left, int64_t right, T *sums,
                           int64_t stride) {
  constexpr int kBytes = SPARKME_VECTOR_BYTES;
  using V = VectorOf<T, kBytes>;
  typename V::Vector sum[Rows][Vectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    const T *numbers = lefts[i] + left;
    typename V::Vector values[Vectors];
    for (int v = 0; v < Vectors; ++v) values[v] = load<T, kBytes>(rights[i] + right + v * V::kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] += values[v] * numbers[r];
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) add_to<T, kBytes>(sums + r * stride + v * V::kLanes, sum[r][v]);
}

template <typename T, int Vectors>
void correlate_columns(const T *const *lefts, const T *const *rights, int64_t count, int64_t depth, int64_t right, T *sums,
                       int64_t stride) {
  int64_t left = 0;
  for (; left + kTileRows <= depth; left += kTileRows)
    correlate_tile<T, kTileRows, Vectors>(lefts, rights, count, left, right, sums + left * stride, stride);
  for (; left + 2 <= depth; left += 2)
    correlate_tile<T, 2, Vectors>(lefts, rights, count, left, right, sums + left * stride, stride);
  for (; left < depth; ++left) correlate_tile<T, 1, Vectors>(lefts, rights, count, left, right, sums + left * stride, stride);
}

template <typename T>
void correlate_rows(const T *const *lefts, const T *const *rights, int64_t count, int64_t depth, int64_t columns, T *sums,
                    int64_t stride) {
  constexpr int kLanes = VectorOf<T, SPARKME_VECTOR_BYTES>::kLanes;
  int64_t c = 0;
  for (; c + kTileColumns<T> <= columns; c += kTileColumns<T>)
    correlate_columns<T, kTileVectors>(lefts, rights, count, depth, c, sums + c, stride);
  for (; c + kLanes <= columns; c += kLanes) correlate_columns<T, 1>(lefts, rights, count, depth, c, sums + c, stride);
  if (c == columns) return;
  const int64_t rest = columns - c;
  std::vector<T> values(count * kLanes, T(0)), results(depth * kLanes, T(0));
  std::vector<const T *> places(count);
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(rights[i] + c, rest, values.data() + i * kLanes);
    places[i] = values.data() + i * kLanes;
  }
  correlate_columns<T, 1>(lefts, places.data(), count, depth, 0, results.data(), kLanes);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t x = 0; x < rest; ++x) sums[k * stride + c + x] += results[k * kLanes + x];
}

}  // namespace
}  // namespace sparkme
