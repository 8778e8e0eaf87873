#include "products.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace sparkme {
namespace {

constexpr int64_t kCacheBytes = int64_t{512} << 10;  // of rows and results that a thread works on: they stay in its cache
constexpr int64_t kPairsAtOnce = 256;                // of an outer product
constexpr int64_t kStrip = 12;                       // rows of an outer product that are one thread's least task

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A kernel's matrices, one per tap and group, (depth, columns); transposed they are (columns, depth) in memory.
struct Matrices {
  int64_t taps, groups, depth, columns, stride, of_tap, of_group;
  bool transposed;

  Matrices(const Tensor &kernel, int64_t groups, bool transposed)
      : taps(kernel.size(0)),
        groups(groups),
        depth(transposed ? kernel.size(2) / groups : kernel.size(1)),
        columns(transposed ? kernel.size(1) : kernel.size(2) / groups),
        stride(kernel.size(2)),
        of_tap(kernel.size(1) * kernel.size(2)),
        of_group(kernel.size(2) / groups),
        transposed(transposed) {}

  template <typename T>
  void pack(const T *kernel, int64_t tap, int64_t group, int64_t column, int64_t count, T *panel) const {
    const T *matrix = kernel + tap * of_tap + group * of_group + column * (transposed ? stride : 1);
    kernels_of<T>().pack(matrix, stride, transposed, depth, count, panel);
  }
};

// How the results of a convolution are cut: what is read again and again should be what is small.
struct Cut {
  int64_t rows, columns;  // of a task

  Cut(int64_t num_rows, const Matrices &kernel, int64_t panel_columns, int64_t number_bytes) {
    const int64_t threads = at::get_num_threads(), panels = divide_up(kernel.columns, panel_columns);
    const int64_t row_bytes = (kernel.depth + kernel.columns) * kernel.groups * number_bytes;
    const bool large = kernel.taps * kernel.depth * kernel.columns * number_bytes * kernel.groups > num_rows * row_bytes;
    const int64_t column_blocks = large ? std::min(panels, threads) : 1;
    const int64_t least = divide_up(num_rows * row_bytes, kCacheBytes * column_blocks);
    const int64_t row_blocks = divide_up(std::max<int64_t>(1, least), threads) * threads;  // as many for each
    columns = divide_up(panels, column_blocks) * panel_columns;
    rows = std::max<int64_t>(6, divide_up(num_rows, row_blocks));
  }
};

}  // namespace

Tensor sum_of_products(const Tensor &rows, const Tensor &kernel, const Tensor &table, int64_t groups, bool transposed) {
  const Matrices matrices(kernel, groups, transposed);
  const int64_t num_rows = table.size(0), channels = rows.size(1), out_channels = groups * matrices.columns;
  Tensor out = at::empty({num_rows, out_channels}, rows.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows.scalar_type(), "sparse_conv", [&] {
    const scalar_t *data = rows.const_data_ptr<scalar_t>(), *weights = kernel.const_data_ptr<scalar_t>();
    const int32_t *entries = table.const_data_ptr<int32_t>();
    scalar_t *result = out.mutable_data_ptr<scalar_t>();
    using S = Sum<scalar_t>;
    constexpr bool kRounded = !std::is_same_v<S, scalar_t>;  // sums are made elsewhere, and rounded at the end
    const int64_t width = kernels_of<scalar_t>().panel_columns;
    const Cut cut(num_rows, matrices, width, sizeof(scalar_t));
    const int64_t row_blocks = divide_up(num_rows, cut.rows), column_blocks = divide_up(matrices.columns, cut.columns);
    at::parallel_for(0, row_blocks * column_blocks * groups, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> panel(matrices.depth * width);
      std::vector<const scalar_t *> sources;
      std::vector<S *> targets;
      std::vector<S> sums(kRounded ? cut.rows * cut.columns : 0);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % row_blocks * cut.rows, last = std::min(num_rows, first + cut.rows);
        const int64_t left = task / row_blocks % column_blocks * cut.columns;
        const int64_t right = std::min(matrices.columns, left + cut.columns), group = task / row_blocks / column_blocks;
        const auto result_of = [&](int64_t n) { return result + n * out_channels + group * matrices.columns + left; };
        const auto sums_of = [&](int64_t n) {
          if constexpr (kRounded) {
            return sums.data() + (n - first) * (right - left);
          } else {
            return result_of(n);
          }
        };
        for (int64_t n = first; n < last; ++n) std::fill_n(sums_of(n), right - left, S(0));
        for (int64_t tap = 0; tap < matrices.taps; ++tap) {
          sources.clear();
          targets.clear();
          for (int64_t n = first; n < last; ++n) {
            const int32_t source = entries[n * matrices.taps + tap];
            if (source < 0) continue;
            sources.push_back(data + source * channels + group * matrices.depth);
            targets.push_back(sums_of(n));
          }
          if (sources.empty()) continue;
          for (int64_t column = left; column < right; column += width) {
            const int64_t count = std::min(width, right - column);
            matrices.pack(weights, tap, group, column, count, panel.data());
            kernels_of<scalar_t>().multiply_rows(sources.data(), targets.data(), sources.size(), matrices.depth, panel.data(),
                                                 count);
            for (S *&place : targets) place += count;
          }
        }
        if constexpr (kRounded)
          for (int64_t n = first; n < last; ++n) kernels_of<scalar_t>().round(sums_of(n), right - left, result_of(n));
      }
    });
  });
  return out;
}

namespace {

// result (K, C_left / groups, C_right) += outer products, or = where they are the first; `find(n, tap)` says which left row
// goes with right row n, or -1.
//
// The sums of a tap and group are cut into strips, and a thread has some of them; it goes through the rows once, a block at a
// time, which stays in its cache for all of its strips. Where the sums are few the rows are shared out, too, and each part of
// them has sums of its own.
template <typename Find>
void correlate(const Tensor &left, const Tensor &right, const Tensor &result, int64_t groups, bool first_of_all,
               const Find &find) {
  const int64_t num_rows = right.size(0), channels = left.size(1), out_channels = right.size(1), taps = result.size(0);
  const int64_t width = channels / groups, out_width = out_channels / groups, strips = divide_up(width, kStrip);
  const int64_t blocks = divide_up(num_rows, kPairsAtOnce), tasks = taps * groups * strips;
  const int64_t threads = at::get_num_threads();
  const bool few = 4 * threads * taps * width * out_channels < num_rows * (channels + out_channels);
  const int64_t parts =
      std::clamp<int64_t>(few ? threads : threads / std::max<int64_t>(1, tasks), 1, std::max<int64_t>(1, blocks));
  if (num_rows == 0) {
    if (first_of_all) result.zero_();
    return;
  }
  const Tensor sums = parts == 1 ? result : at::empty({parts, taps, width, out_channels}, result.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, left.scalar_type(), "sparse_conv_grad_kernel", [&] {
    const scalar_t *left_data = left.const_data_ptr<scalar_t>(), *right_data = right.const_data_ptr<scalar_t>();
    Sum<scalar_t> *data = sums.mutable_data_ptr<Sum<scalar_t>>();
    at::parallel_for(0, parts * tasks, 1, [&](int64_t begin, int64_t end) {
      const scalar_t *lefts[kPairsAtOnce], *rights[kPairsAtOnce];
      while (begin < end) {
        const int64_t part = begin / tasks, from = begin % tasks, to = std::min(tasks, from + end - begin);
        const int64_t first_block = part * blocks / parts, last_block = (part + 1) * blocks / parts;
        for (int64_t block = first_block; block < last_block; ++block) {
          const int64_t first = num_rows * block / blocks, last = num_rows * (block + 1) / blocks;
          for (int64_t task = from; task < to;) {  // all strips of a tap and group that are this thread's
            const int64_t which = task / strips, tap = which / groups, group = which % groups;
            const int64_t next = std::min(to, (which + 1) * strips);
            const int64_t top = (task - which * strips) * kStrip, bottom = std::min(width, (next - which * strips) * kStrip);
            int64_t count = 0;
            for (int64_t n = first; n < last; ++n) {
              const int64_t source = find(n, tap);
              if (source < 0) continue;
              lefts[count] = left_data + source * channels + group * width;
              rights[count++] = right_data + n * out_channels + group * out_width;
            }
            Sum<scalar_t> *target = data + ((part * taps + tap) * width + top) * out_channels + group * out_width;
            kernels_of<scalar_t>().correlate_rows(lefts, rights, count, top, bottom - top, out_width, target, out_channels,
                                                  block == first_block && (parts > 1 || first_of_all));
            task = next;
          }
        }
        begin += to - from;
      }
    });
  });
  if (parts == 1) return;
  if (first_of_all) {
    at::sum_out(const_cast<Tensor &>(result), sums, 0);
  } else {
    result.add_(sums.sum(0));
  }
}

}  // namespace

Tensor outer_products(const Tensor &left, const Tensor &right, const Tensor &table, int64_t groups) {
  const int32_t *entries = table.const_data_ptr<int32_t>();
  const int64_t taps = table.size(1);
  const Tensor sums = at::empty({taps, left.size(1) / groups, right.size(1)}, right.options().dtype(sum_type(right)));
  correlate(left, right, sums, groups, true, [&](int64_t n, int64_t tap) { return entries[n * taps + tap]; });
  return sums.to(right.scalar_type());
}

void add_outer_product(const Tensor &left, const Tensor &right, const Tensor &sums, bool first) {
  correlate(left, right, sums.unsqueeze(0), 1, first, [](int64_t n, int64_t) { return n; });
}

Tensor outer_product(const Tensor &left, const Tensor &right) {
  const Tensor sums = at::empty({left.size(1), right.size(1)}, right.options().dtype(sum_type(right)));
  add_outer_product(left, right, sums, true);
  return sums.to(right.scalar_type());
}

}  // namespace sparkme
