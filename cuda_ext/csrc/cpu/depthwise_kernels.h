// The inner loops of the depthwise convolution, compiled once per instruction set.
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
};

template <typename T>
struct DepthwiseKernels {
  // out (side^2, C) = the patch convolved with kernel (height * width, C).
  void (*convolve)(const DepthwisePatch<T> &patch, const Sum<T> *kernel, T *out);
  // sums (height * width, C) += the product of grad (side^2, C) and the patch, for `count` patches.
  void (*correlate)(const DepthwisePatch<T> *patches, const T *const *grads, int64_t count, Sum<T> *sums);
};

struct DepthwiseTable {
  DepthwiseKernels<double> of_double;
  DepthwiseKernels<float> of_float;
  DepthwiseKernels<c10::BFloat16> of_bfloat16;
};

extern const DepthwiseTable kDepthwiseBaseline;
#if defined(__x86_64__) && defined(__GNUC__)
extern const DepthwiseTable kDepthwiseAvx2, kDepthwiseAvx512;
#endif

}  // namespace sparkme
