// All inner loops, for one instruction set: the source file that includes this defines SPARKME_VECTOR_BYTES and SPARKME_TABLE.
#include "depthwise_kernels.inl"
#include "gelu_kernels.inl"
#include "norm_kernels.inl"

namespace sparkme {

template <typename T>
constexpr Kernels<T> kKernels = {convolve<T>,       correlate<T>,   statistics<T>, normalise<T>,     norm_grad_sums<T>,
                                 norm_grad_rows<T>, masked_sums<T>, gelu<T>,       gelu_with_grad<T>};

const KernelTable SPARKME_TABLE = {kKernels<double>, kKernels<float>, kKernels<c10::BFloat16>};

}  // namespace sparkme
