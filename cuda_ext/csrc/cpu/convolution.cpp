// Sparse convolution over a neighbour table, as products with gathered rows. In two ways:
//
// By columns. The neighbours of a block of rows are gathered into columns, (n, K * C_in), that fit into the cache, and
// multiplied by the whole kernel at once; a missing neighbour is a row of zeros.
//
// By taps. For each tap, the rows that have a neighbour are gathered, multiplied by the tap's kernel, and added where they
// belong: no two rows share a neighbour through one tap, so threads never meet. This multiplies no zeros, and wins where
// many neighbours are missing, as in patches of one or two pixels. The rows' gradient is computed so, since it serves any
// stride, but for bfloat16.
//
// Measured (3x3 of ResNet-50, batch 8, mask ratio 0.6, float32, one thread; milliseconds for forward / rows' gradient /
// kernel's gradient), against torch's convolution on patches with a halo:
//
//   stride   neighbours that exist   by columns       by taps           with a halo
//   4        94 %                    3.5 / 3.9 / 3.9  4.6 / 4.7 / 7.9   3.3 / 3.5 / 3.8
//   8        82 %                    3.4 / 3.4 / 3.7  3.2 / 3.2 / 4.2   3.5 / 3.4 / 4.0
//   16       66 %                    3.9 / 4.2 / 3.9  2.3 / 2.3 / 2.7   8.0 / 7.7 / 10.6
//   32       47 %                    3.9 / 6.8 / 7.3  2.0 / 1.9 / 2.0   22.5 / 16.7 / 42
//
// So halos are not worth code of their own.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "bounds.h"
#include "gemm.h"
#include "products.h"

namespace sparkme {
namespace {

constexpr int64_t kColumnBytes = int64_t{8} << 20;  // a block of columns; measured: 2 to 16 MiB are equally fast

// Rows that one thread should at least copy at a time.
int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

int64_t block_rows(int64_t num_rows, int64_t row_bytes) {
  const int64_t blocks = std::max<int64_t>(1, (num_rows * row_bytes + kColumnBytes - 1) / kColumnBytes);
  return std::max<int64_t>(1, (num_rows + blocks - 1) / blocks);
}

// The columns of rows [first, first + columns.size(0)), (n, K * width), of the channels [start, start + width).
template <typename T>
void gather(const at::Tensor &rows, const at::Tensor &table, int64_t first, int64_t start, int64_t width, at::Tensor &columns) {
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

at::Tensor columns_of(const at::Tensor &rows, const at::Tensor &table, int64_t first, int64_t count, int64_t start,
                      int64_t width) {
  at::Tensor columns = at::empty({count, table.size(1) * width}, rows.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows.scalar_type(), "sparse_conv",
                                 [&] { gather<scalar_t>(rows, table, first, start, width, columns); });
  return columns;
}

at::ScalarType sum_type(const at::Tensor &rows) {
  return rows.scalar_type() == at::kBFloat16 ? at::kFloat : rows.scalar_type();
}

at::Tensor conv_by_columns(const at::Tensor &rows, const at::Tensor &kernel, const at::Tensor &table, int64_t groups) {
  const int64_t taps = kernel.size(0), width = kernel.size(1), out_width = kernel.size(2) / groups;
  const int64_t num_rows = table.size(0), block = block_rows(num_rows, taps * width * rows.element_size());
  at::Tensor out = at::empty({num_rows, kernel.size(2)}, rows.options());
  for (int64_t first = 0; first < num_rows; first += block) {
    const int64_t count = std::min(block, num_rows - first);
    for (int64_t group = 0; group < groups; ++group) {
      const at::Tensor columns = columns_of(rows, table, first, count, group * width, width);
      const at::Tensor part = kernel.narrow(2, group * out_width, out_width).reshape({taps * width, out_width});
      const at::Tensor product = gemm(columns, part);
      if (count == num_rows && groups == 1) return product;
      out.narrow(0, first, count).narrow(1, group * out_width, out_width).copy_(product);
    }
  }
  return out;
}

at::Tensor sparse_conv(const at::Tensor &rows, const at::Tensor &kernel, const at::Tensor &table,
                       const std::optional<at::Tensor> &inverse, int64_t groups) {
  const at::Tensor rows_ = rows.contiguous(), kernel_ = kernel.contiguous(), table_ = table.contiguous();
  TORCH_CHECK_VALUE(groups > 0 && rows_.size(1) == kernel_.size(1) * groups && table_.size(1) == kernel_.size(0), "kernel ",
                    kernel_.sizes(), " does not fit rows ", rows_.sizes());
  check_table("table", table_, rows_.size(0));
  return rows_.scalar_type() == at::kBFloat16 ? conv_by_columns(rows_, kernel_, table_, groups)
                                              : sum_of_products(rows_, kernel_, table_, groups);
}

at::Tensor sparse_conv_grad_rows(const at::Tensor &grad, const at::Tensor &kernel, const at::Tensor &table,
                                 const at::Tensor &inverse, int64_t groups) {
  const at::Tensor grad_ = grad.contiguous(), kernel_ = kernel.contiguous(), table_ = table.contiguous();
  const int64_t taps = kernel_.size(0), width = kernel_.size(1), out_width = kernel_.size(2) / groups;
  check_rows("grad", grad_, table_.size(0));
  TORCH_CHECK_VALUE(groups > 0 && grad_.size(1) == kernel_.size(2) && table_.size(1) == taps, "kernel ", kernel_.sizes(),
                    " does not fit grad ", grad_.sizes());
  check_table("table", table_, inverse.size(0));
  const at::Tensor inverse_ = inverse.contiguous();
  check_table("inverse", inverse_, grad_.size(0));
  if (grad_.scalar_type() == at::kBFloat16 && inverse.size(0) > table_.size(0)) {
    // Strided: by columns, three quarters of the products would be with zeros.
    return sparse_conv_grad_rows(grad_.to(at::kFloat), kernel_.to(at::kFloat), table_, inverse, groups).to(at::kBFloat16);
  }
  const at::Tensor turned =
      groups == 1
          ? transposed(kernel_)
          : kernel_.view({taps, width, groups, out_width}).permute({0, 3, 2, 1}).reshape({taps, out_width, groups * width});
  return grad_.scalar_type() == at::kBFloat16 ? conv_by_columns(grad_, turned, inverse_, groups)
                                              : sum_of_products(grad_, turned, inverse_, groups);
}

at::Tensor sparse_conv_grad_kernel(const at::Tensor &rows, const at::Tensor &grad, const at::Tensor &table, int64_t groups) {
  const at::Tensor rows_ = rows.contiguous(), grad_ = grad.contiguous(), table_ = table.contiguous();
  TORCH_CHECK_VALUE(groups > 0, "groups ", groups, " must be positive");
  const int64_t taps = table_.size(1), width = rows_.size(1) / groups, out_width = grad_.size(1) / groups;
  const int64_t num_rows = table_.size(0);
  check_rows("grad", grad_, num_rows);
  check_table("table", table_, rows_.size(0));
  if (rows_.scalar_type() != at::kBFloat16) return outer_products(rows_, grad_, table_, groups);
  at::Tensor out = at::empty({taps, width, groups * out_width}, grad_.options());
  const int64_t block = block_rows(num_rows, taps * width * rows_.element_size());
  for (int64_t group = 0; group < groups; ++group) {
    at::Tensor sum = at::zeros({out_width, taps * width}, grad_.options().dtype(sum_type(grad_)));
    for (int64_t first = 0; first < num_rows; first += block) {
      const int64_t count = std::min(block, num_rows - first);
      const at::Tensor columns = columns_of(rows_, table_, first, count, group * width, width);
      // This way round oneDNN is up to twice as fast, although the result has to be transposed.
      const at::Tensor product = gemm(grad_.narrow(0, first, count).narrow(1, group * out_width, out_width).t(), columns);
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
