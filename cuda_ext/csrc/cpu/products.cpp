#include "products.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace sparkme {
namespace {

constexpr int64_t kBlockRows = 96;     // of results that a thread works on, through all taps: what they need stays in its cache
constexpr int64_t kPairsAtOnce = 256;  // of an outer product
constexpr int64_t kDepthAtOnce = 24, kColumnsAtOnce = 512;  // of an outer product that are one thread's task

// A task's share of an outer product: rows [0, depth) and some columns of one tap and group. `find(n)` says which left row goes
// with right row n, or -1.
template <typename T, typename Find>
void correlate_task(const T *left, int64_t left_channels, const T *right, int64_t right_channels, int64_t num_rows,
                    int64_t depth, int64_t columns, T *sums, int64_t stride, const Find &find) {
  const T *lefts[kPairsAtOnce], *rights[kPairsAtOnce];
  int64_t count = 0;
  const auto flush = [&] {
    kernels_of<T>().correlate_rows(lefts, rights, count, depth, columns, sums, stride);
    count = 0;
  };
  for (int64_t n = 0; n < num_rows; ++n) {
    const int64_t source = find(n);
    if (source < 0) continue;
    lefts[count] = left + source * left_channels;
    rights[count] = right + n * right_channels;
    if (++count == kPairsAtOnce) flush();
  }
  flush();
}

}  // namespace

at::Tensor sum_of_products(const at::Tensor &rows, const at::Tensor &kernel, const at::Tensor &table, int64_t groups) {
  const int64_t num_rows = table.size(0), taps = table.size(1), width = kernel.size(1), out_channels = kernel.size(2);
  const int64_t channels = rows.size(1), out_width = out_channels / groups;
  // A group's columns of a kernel next to each other.
  const at::Tensor parts =
      groups == 1 ? kernel : kernel.view({taps, width, groups, out_width}).permute({2, 0, 1, 3}).contiguous();
  at::Tensor out = at::empty({num_rows, out_channels}, rows.options());
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "sparse_conv", [&] {
    const scalar_t *data = rows.const_data_ptr<scalar_t>(), *weights = parts.const_data_ptr<scalar_t>();
    const int32_t *entries = table.const_data_ptr<int32_t>();
    scalar_t *result = out.mutable_data_ptr<scalar_t>();
    const int64_t threads = at::get_num_threads();
    const int64_t block = std::clamp<int64_t>((num_rows + threads - 1) / threads, 6, kBlockRows);
    at::parallel_for(0, (num_rows + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      std::vector<const scalar_t *> sources;
      std::vector<scalar_t *> targets;
      for (int64_t first = begin * block; first < std::min(num_rows, end * block); first += block) {
        const int64_t last = std::min(num_rows, first + block);
        std::fill(result + first * out_channels, result + last * out_channels, scalar_t(0));
        for (int64_t group = 0; group < groups; ++group) {
          for (int64_t tap = 0; tap < taps; ++tap) {
            sources.clear();
            targets.clear();
            for (int64_t n = first; n < last; ++n) {
              const int32_t source = entries[n * taps + tap];
              if (source < 0) continue;
              sources.push_back(data + source * channels + group * width);
              targets.push_back(result + n * out_channels + group * out_width);
            }
            kernels_of<scalar_t>().multiply_rows(sources.data(), targets.data(), sources.size(), width,
                                                 weights + (group * taps + tap) * width * out_width, out_width);
          }
        }
      }
    });
  });
  return out;
}

namespace {

// `find(n, tap)` says which left row goes with right row n.
template <typename Find>
at::Tensor correlate(const at::Tensor &left, const at::Tensor &right, int64_t taps, int64_t groups, const Find &find) {
  const int64_t channels = left.size(1), out_channels = right.size(1), width = channels / groups,
                out_width = out_channels / groups;
  const int64_t heights = (width + kDepthAtOnce - 1) / kDepthAtOnce, widths = (out_width + kColumnsAtOnce - 1) / kColumnsAtOnce;
  at::Tensor sums = at::zeros({taps, width, out_channels}, right.options());
  AT_DISPATCH_FLOATING_TYPES(left.scalar_type(), "sparse_conv_grad_kernel", [&] {
    const scalar_t *left_data = left.const_data_ptr<scalar_t>(), *right_data = right.const_data_ptr<scalar_t>();
    scalar_t *result = sums.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, taps * groups * heights * widths, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task % heights * kDepthAtOnce, column = task / heights % widths * kColumnsAtOnce;
        const int64_t group = task / heights / widths % groups, tap = task / heights / widths / groups;
        const scalar_t *lefts = left_data + group * width + row, *rights = right_data + group * out_width + column;
        correlate_task(lefts, channels, rights, out_channels, right.size(0), std::min(kDepthAtOnce, width - row),
                       std::min(kColumnsAtOnce, out_width - column),
                       result + (tap * width + row) * out_channels + group * out_width + column, out_channels,
                       [&](int64_t n) { return find(n, tap); });
      }
    });
  });
  return sums;
}

}  // namespace

at::Tensor outer_products(const at::Tensor &left, const at::Tensor &right, const at::Tensor &table, int64_t groups) {
  const int32_t *entries = table.const_data_ptr<int32_t>();
  const int64_t taps = table.size(1);
  return correlate(left, right, taps, groups, [&](int64_t n, int64_t tap) { return entries[n * taps + tap]; });
}

at::Tensor outer_product(const at::Tensor &left, const at::Tensor &right) {
  // The narrower one on the right, whose columns then stay in the cache: up to half as fast again, measured.
  if (right.size(1) > left.size(1)) return transposed(outer_product(right, left));
  return correlate(left, right, 1, 1, [](int64_t n, int64_t) { return n; }).squeeze(0);
}

}  // namespace sparkme
