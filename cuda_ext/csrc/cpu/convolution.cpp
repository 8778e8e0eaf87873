// Sparse convolution over a neighbour table. In two ways:
//
// Directly (products.cpp): tap by tap, the rows that have a neighbour are multiplied where they lie; a missing neighbour costs
// nothing. Where there are channels enough to fill a vector, in float32 and float64, and in bfloat16 where the processor
// multiplies pairs of such numbers.
//
// By columns: the neighbours of a block of rows are gathered into columns, (n, K * C_in), that fit into the cache, and
// multiplied by the whole kernel at once; a missing neighbour is a row of zeros. For few channels, such as an image's, and in
// bfloat16 on other processors, whose products are oneDNN's.
//
// Measured, directly (3x3 of ResNet-50, batch 8, mask ratio 0.6, two threads that reach 220 GFLOP/s in a large product of
// float32 and 440 of bfloat16; milliseconds for forward / rows' gradient / kernel's gradient, and GFLOP/s of the neighbours
// that exist):
//
//   stride   neighbours that exist   float32                             bfloat16
//   4        89 %                    3.5 / 3.5 / 3.4   194 / 192 / 199   2.3 / 2.1 / 3.4   300 / 323 / 196
//   8        80 %                    2.8 / 2.9 / 2.9   211 / 209 / 211   1.5 / 1.6 / 2.1   391 / 388 / 293
//   16       62 %                    2.2 / 2.2 / 2.1   212 / 211 / 220   1.2 / 1.2 / 1.3   405 / 398 / 356
//   32       39 %                    1.6 / 1.7 / 1.4   182 / 170 / 206   0.9 / 0.9 / 0.9   337 / 334 / 331
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "bounds.h"
#include "gemm.h"
#include "kernels.h"
#include "products.h"

namespace sparkme {
namespace {

constexpr int64_t kColumnBytes = int64_t{8} << 20;  // a block of columns; measured: 2 to 16 MiB are equally fast

constexpr int64_t kFewChannels = 16;

// Rows that one thread should at least copy at a time.
int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

int64_t block_rows(int64_t num_rows, int64_t row_bytes) {
  const int64_t blocks = std::max<int64_t>(1, (num_rows * row_bytes + kColumnBytes - 1) / kColumnBytes);
  return std::max<int64_t>(1, (num_rows + blocks - 1) / blocks);
}

// The columns of rows [first, first + columns.size(0)), (n, K * width), of the channels [start, start + width).
template <typename T>
void gather(const Tensor &rows, const Tensor &table, int64_t first, int64_t start, int64_t width, Tensor &columns) {
  const int64_t taps = table.size(1), channels = rows.size(1);
  const T *source = rows.const_data_ptr<T>() + start;
  const int32_t *entries = table.const_data_ptr<int32_t>() + first * taps;
  T *target = columns.mutable_data_ptr<T>();
  at::parallel_for(0, columns.size(0) * taps, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (entries[i] < 0) {
        std::memset(static_cast<void *>(target + i * width), 0, width * sizeof(T));
      } else {
        std::memcpy(static_cast<void *>(target + i * width), source + entries[i] * channels, width * sizeof(T));
      }
    }
  });
}

Tensor columns_of(const Tensor &rows, const Tensor &table, int64_t first, int64_t count, int64_t start, int64_t width) {
  Tensor columns = at::empty({count, table.size(1) * width}, rows.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows.scalar_type(), "sparse_conv",
                                 [&] { gather<scalar_t>(rows, table, first, start, width, columns); });
  return columns;
}

// Whether a product is computed directly: of rows with at least `channels` channels, over `depth` of them.
bool directly(const Tensor &rows, int64_t channels, int64_t depth) {
  const bool can = rows.scalar_type() != at::kBFloat16 || (kernels_of<c10::BFloat16>().panel_columns > 0 && depth % 2 == 0);
  return can && channels >= kFewChannels;
}

Tensor conv_by_columns(const Tensor &rows, const Tensor &kernel, const Tensor &table, int64_t groups) {
  const int64_t taps = kernel.size(0), width = kernel.size(1), out_width = kernel.size(2) / groups;
  const int64_t num_rows = table.size(0), block = block_rows(num_rows, taps * width * rows.element_size());
  Tensor out = at::empty({num_rows, kernel.size(2)}, rows.options());
  for (int64_t first = 0; first < num_rows; first += block) {
    const int64_t count = std::min(block, num_rows - first);
    for (int64_t group = 0; group < groups; ++group) {
      const Tensor columns = columns_of(rows, table, first, count, group * width, width);
      const Tensor part = kernel.narrow(2, group * out_width, out_width).reshape({taps * width, out_width});
      const Tensor product = gemm(columns, part);
      if (count == num_rows && groups == 1) return product;
      out.narrow(0, first, count).narrow(1, group * out_width, out_width).copy_(product);
    }
  }
  return out;
}

Tensor sparse_conv(const Tensor &rows, const Tensor &kernel, const Tensor &table, const Optional &inverse, int64_t groups) {
  const Tensor rows_ = rows.contiguous(), kernel_ = kernel.contiguous(), table_ = table.contiguous();
  TORCH_CHECK_VALUE(groups > 0 && rows_.size(1) == kernel_.size(1) * groups && table_.size(1) == kernel_.size(0), "kernel ",
                    kernel_.sizes(), " does not fit rows ", rows_.sizes());
  check_table("table", table_, rows_.size(0));
  return directly(rows_, kernel_.size(1), kernel_.size(1)) ? sum_of_products(rows_, kernel_, table_, groups, false)
                                                           : conv_by_columns(rows_, kernel_, table_, groups);
}

Tensor sparse_conv_grad_rows(const Tensor &grad, const Tensor &kernel, const Tensor &table, const Tensor &inverse,
                             int64_t groups) {
  const Tensor grad_ = grad.contiguous(), kernel_ = kernel.contiguous(), table_ = table.contiguous();
  const int64_t taps = kernel_.size(0), width = kernel_.size(1), out_width = kernel_.size(2) / groups;
  check_rows("grad", grad_, table_.size(0));
  TORCH_CHECK_VALUE(groups > 0 && grad_.size(1) == kernel_.size(2) && table_.size(1) == taps, "kernel ", kernel_.sizes(),
                    " does not fit grad ", grad_.sizes());
  check_table("table", table_, inverse.size(0));
  const Tensor inverse_ = inverse.contiguous();
  check_table("inverse", inverse_, grad_.size(0));
  const bool strided = inverse.size(0) > table_.size(0);  // three quarters of the columns would be zeros
  if (directly(grad_, strided ? kFewChannels : out_width, out_width))
    return sum_of_products(grad_, kernel_, inverse_, groups, true);
  if (strided)
    return sparse_conv_grad_rows(grad_.to(at::kFloat), kernel_.to(at::kFloat), table_, inverse_, groups)
        .to(grad_.scalar_type());
  const Tensor turned =
      groups == 1
          ? transposed(kernel_)
          : kernel_.view({taps, width, groups, out_width}).permute({0, 3, 2, 1}).reshape({taps, out_width, groups * width});
  return conv_by_columns(grad_, turned, inverse_, groups);
}

Tensor sparse_conv_grad_kernel(const Tensor &rows, const Tensor &grad, const Tensor &table, int64_t groups) {
  const Tensor rows_ = rows.contiguous(), grad_ = grad.contiguous(), table_ = table.contiguous();
  TORCH_CHECK_VALUE(groups > 0, "groups ", groups, " must be positive");
  const int64_t taps = table_.size(1), width = rows_.size(1) / groups, out_width = grad_.size(1) / groups;
  const int64_t num_rows = table_.size(0);
  check_rows("grad", grad_, num_rows);
  check_table("table", table_, rows_.size(0));
  if (directly(rows_, width, 0)) return outer_products(rows_, grad_, table_, groups);
  Tensor out = at::empty({taps, width, groups * out_width}, grad_.options());
  const int64_t block = block_rows(num_rows, taps * width * rows_.element_size());
  for (int64_t group = 0; group < groups; ++group) {
    Tensor sum = at::zeros({out_width, taps * width}, grad_.options().dtype(sum_type(grad_)));
    for (int64_t first = 0; first < num_rows; first += block) {
      const int64_t count = std::min(block, num_rows - first);
      const Tensor columns = columns_of(rows_, table_, first, count, group * width, width);
      // This way round oneDNN is up to twice as fast, although the result has to be transposed.
      const Tensor product = gemm(grad_.narrow(0, first, count).narrow(1, group * out_width, out_width).t(), columns);
      sum = first == 0 ? product.to(sum_type(grad_)) : sum.add_(product);
    }
    out.narrow(2, group * out_width, out_width).copy_(sum.t().view({taps, width, out_width}));
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, CPU, m) {
  m.impl("sparse_conv", sparse_conv);
  m.impl("sparse_conv_grad_rows", sparse_conv_grad_rows);
  m.impl("sparse_conv_grad_kernel", sparse_conv_grad_kernel);
}

}  // namespace sparkme
