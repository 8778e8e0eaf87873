// The inner loops, compiled once per instruction set.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace sparkme {

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// One visible patch. `tile` points at the rows of the patch and its halo, (rows, columns); a hidden pixel is `zero`, a row of
// zeros.
template <typename T>
struct DepthwisePatch {
  const T *const *tile;
  int32_t tile_columns;
  const T *zero;
  int32_t side, stride, dilation;  // of the output patch, of the convolution
  int32_t height, width;           // of the kernel
  int64_t channels;
  bool spread;  // whether most of the tile is hidden, since rows lie at every so many pixels only
};

// Batch norm, times a factor for each sample, plus a residual, then perhaps a clamp, which is a ReLU:
//     y = min(max(factor * (scale * x + shift) + residual, 0), ceiling)
// Channels lie next to each other, so all numbers per channel are arrays of `channels`.
template <typename T>
struct NormRows {
  const T *rows;
  int64_t count, channels;  // of rows
  const Sum<T> *scale, *shift;
  const Sum<T> *factors;  // of each row's sample, or null for one
  Sum<T> ceiling;         // NaN for none
};

template <typename T>
struct Kernels {
  // out (side^2, C) = the patch convolved with kernel (height * width, C), plus bias (C), which may be null.
  void (*convolve)(const DepthwisePatch<T> &patch, const Sum<T> *kernel, const Sum<T> *bias, T *out);
  // sums (height * width, C) += the product of grad (side^2, C) and the patch, for `count` patches.
  void (*correlate)(const DepthwisePatch<T> *patches, const T *const *grads, int64_t count, Sum<T> *sums);
  // out (channels, count) = rows (count, channels) transposed; rows of both are their stride apart.
  void (*transpose)(const T *rows, int64_t stride, int64_t count, int64_t channels, T *out, int64_t out_stride);
  // The next four are null where panel_columns is 0: for bfloat16, unless the processor multiplies pairs of it. Then depth and
  // stride are even. A panel holds at most panel_columns of a matrix, (depth, columns), with zeros behind them up to a whole
  // vector; the matrix' rows are `stride` apart, and if it is transposed, they are its columns.
  int64_t panel_columns;
  void (*pack)(const T *matrix, int64_t stride, bool transposed, int64_t depth, int64_t columns, T *panel);
  // targets[i] (columns) += sources[i] (depth) times a panel, for `count` pairs.
  void (*multiply_rows)(const T *const *sources, Sum<T> *const *targets, int64_t count, int64_t depth, const T *panel,
                        int64_t columns);
  // sums (depth, columns), whose rows are `stride` apart, += the sum of the outer products of lefts[i] (depth, from number
  // `left` on) and rights[i] (columns); = instead of += where they are the first.
  void (*correlate_rows)(const T *const *lefts, const T *const *rights, int64_t count, int64_t left, int64_t depth,
                         int64_t columns, Sum<T> *sums, int64_t stride, bool first);
  // out = numbers, rounded.
  void (*round)(const Sum<T> *numbers, int64_t count, T *out);
  // sums (2, C) = the sum of rows - the first row, and of its square.
  void (*statistics)(const T *rows, int64_t count, int64_t channels, Sum<T> *sums);
  // out = y; residual may be null.
  void (*normalise)(const NormRows<T> &x, const T *residual, T *out);
  // sums (2, C) = the sum of g * factor, and of g * factor * (x - mean), where g is grad where 0 < y < ceiling; y is `out`, or
  // worked out again where that is null. g goes to `masked`, if not null.
  void (*norm_grad_sums)(const NormRows<T> &x, const T *grad, const T *out, const Sum<T> *mean, Sum<T> *sums, T *masked);
  // grad_rows = by_grad * g * factor + by_row * (x - mean) + constant, per channel.
  void (*norm_grad_rows)(const NormRows<T> &x, const T *grad, const Sum<T> *mean, const Sum<T> *by_grad, const Sum<T> *by_row,
                         const Sum<T> *constant, T *grad_rows);
  // masked = grad where 0 < out < ceiling, or nothing where out is null; sums (C) = the sum of that times the rows' factors.
  void (*masked_sums)(const T *grad, const T *out, Sum<T> ceiling, const Sum<T> *factors, int64_t count, int64_t channels,
                      Sum<T> *sums, T *masked);
  // Layer norm of `count` rows: out = weight * (x - mean) * inverse_deviation + bias; statistics (count, 2) = the mean and
  // inverse deviation of each row.
  void (*layer_norm)(const T *rows, int64_t count, int64_t channels, const Sum<T> *weight, const Sum<T> *bias, Sum<T> epsilon,
                     T *out, Sum<T> *statistics);
  // The gradient of its rows; sums (2, C) = the sum of grad, and of grad * (x - mean) * inverse_deviation.
  void (*layer_norm_grad)(const T *grad, const T *rows, int64_t count, int64_t channels, const Sum<T> *weight,
                          const Sum<T> *statistics, T *grad_rows, Sum<T> *sums);
  // out (C) = the sum of `count` rows, of each those channels whose `taken` is the row's tap.
  void (*sum_taken)(const T *const *rows, const uint8_t *const *taken, const uint8_t *taps, int64_t count, int64_t channels,
                    T *out);
  // The sum of x * grad; grad becomes its product with scale.
  Sum<T> (*dot_and_scale)(const T *x, int64_t count, Sum<T> scale, Sum<T> *grad);
  // out = GELU of x; grad becomes its product with GELU's derivative there.
  void (*gelu)(const T *x, int64_t count, T *out);
  void (*gelu_with_grad)(const T *x, int64_t count, T *out, T *grad);
};

struct KernelTable {
  Kernels<double> of_double;
  Kernels<float> of_float;
  Kernels<c10::BFloat16> of_bfloat16;
};

extern const KernelTable kKernelsBaseline;
#if defined(__x86_64__) && defined(__GNUC__)
extern const KernelTable kKernelsAvx2, kKernelsAvx512, kKernelsAvx512Bf16;
#endif

const KernelTable &kernel_table();  // for this processor

template <typename T>
const Kernels<T> &kernels_of() {
  if constexpr (std::is_same_v<T, double>) {
    return kernel_table().of_double;
  } else if constexpr (std::is_same_v<T, float>) {
    return kernel_table().of_float;
  } else {
    return kernel_table().of_bfloat16;
  }
}

}  // namespace sparkme
