// All inner loops, for one instruction set: the source file that includes this defines SPARKME_VECTOR_BYTES and SPARKME_TABLE.
#include "depthwise_kernels.inl"
#include "gelu_kernels.inl"
#include "norm_kernels.inl"
#include "pooling_kernels.inl"
#include "product_kernels.inl"

namespace sparkme {
namespace {

template <typename T>
constexpr Kernels<T> all_kernels() {
  Kernels<T> all{};
  all.convolve = convolve<T>;
  all.correlate = correlate<T>;
  all.transpose = transpose<T>;
  all.round = round_numbers<T>;
  if constexpr (Terms<T>::kCount > 0) {
    all.panel_columns = kPanelColumns<T>;
    all.pack = pack<T>;
    all.multiply_rows = multiply_rows<T>;
    all.correlate_rows = correlate_rows<T>;
  }
  all.statistics = statistics<T>;
  all.normalise = normalise<T>;
  all.norm_grad_sums = norm_grad_sums<T>;
  all.norm_grad_rows = norm_grad_rows<T>;
  all.masked_sums = masked_sums<T>;
  all.layer_norm = layer_norm<T>;
  all.layer_norm_grad = layer_norm_grad<T>;
  all.sum_taken = sum_taken<T>;
  all.dot_and_scale = dot_and_scale<T>;
  all.gelu = gelu<T>;
  all.gelu_with_grad = gelu_with_grad<T>;
  return all;
}

}  // namespace

const KernelTable SPARKME_TABLE = {all_kernels<double>(), all_kernels<float>(), all_kernels<c10::BFloat16>()};

}  // namespace sparkme
