// The CUDA operators on plain pointers, for double, float and c10::BFloat16; operators.cu hands them torch's tensors. Rows,
// tables and kernels are contiguous; sparkme/ops/__init__.py says what they mean. Nothing here waits for the device.
#pragma once

#include "launch.h"

namespace sparkme::cuda {

// The map of a batch, in any memory format.
template <typename T>
struct Dense {
  T *data;
  int64_t stride_sample, stride_channel, stride_y, stride_x;  // in elements
};

// A convolution over the rows of visible patches.
struct Geometry {
  Sites sites;
  Window window;
  int64_t patches;          // visible ones
  int32_t pixels;           // along a patch of the convolution's input
  int32_t multiprocessors;  // of the device, which the size of some grids follows
};

// Gives that many bytes of the device's memory until the caller's work is queued.
using Allocate = std::function<void *(int64_t bytes)>;

void neighbour_table(int32_t *table, const Geometry &geometry, bool transposed, Stream stream);

// `transposed` gives the gradient of the rows: then `rows` is the gradient of the outputs, and `out` has a row per input.
// `bias` may be null.
template <typename T>
void depthwise_conv(T *out, const T *rows, const T *kernel, const T *bias, const Geometry &geometry, int32_t channels,
                    bool transposed, Stream stream);

template <typename T>
void depthwise_conv_grad_kernel(T *out, const T *rows, const T *grad, const Geometry &geometry, int32_t channels,
                                const Allocate &allocate, Stream stream);

template <typename T>
void max_pool(T *out, uint8_t *taken, const T *rows, const int32_t *table, int64_t targets, int32_t taps, int32_t channels,
              Stream stream);

template <typename T>
void max_pool_grad_rows(T *out, const T *grad, const uint8_t *taken, const int32_t *inverse, int64_t targets, int32_t taps,
                        int32_t channels, Stream stream);

template <typename T>
void avg_pool(T *out, const T *rows, const int32_t *table, int64_t targets, int32_t taps, int32_t channels, Stream stream);

template <typename T>
void voxelise(T *rows, const Dense<const T> &dense, const Sites &sites, int64_t patches, int32_t pixels, int32_t channels,
              Stream stream);

// `dense` has channels_last memory without gaps; `fill` may be null.
template <typename T>
void densify(T *dense, const T *rows, const T *fill, const Sites &sites, int64_t samples, int32_t pixels, int32_t channels,
             Stream stream);

// A batch norm of rows (count, channels), and what follows it. Numbers per channel are in the type of sums.
template <typename T>
struct Norm {
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

// Of at least one row.
template <typename T>
void batch_statistics(const Statistics<Sum<T>> &statistics, const T *rows, int64_t count, int32_t channels,
                      int32_t multiprocessors, const Allocate &allocate, Stream stream);

// `residual` may be null.
template <typename T>
void batch_norm(T *out, const Norm<T> &norm, const T *residual, int32_t multiprocessors, Stream stream);

// `sums` (2, channels): of the gradient of the norm's result, and of that times the normalised rows. Where the result `out` is
// given, the gradient without what was clamped is written to `masked`; else both are null.
template <typename T>
void batch_norm_grad_sums(T *masked, Sum<T> *sums, const Norm<T> &norm, const T *grad, const T *out, int32_t multiprocessors,
                          const Allocate &allocate, Stream stream);

// `sums` is null where the statistics did not come from these rows; times `per_row` they are means.
template <typename T>
void batch_norm_grad_rows(T *result, const Norm<T> &norm, const T *grad, const Sum<T> *sums, double per_row,
                          int32_t multiprocessors, Stream stream);

}  // namespace sparkme::cuda
