// Pooling over a neighbour table.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bounds.h"
#include "kernels.h"

namespace sparkme {
namespace {

constexpr int64_t kGrain = 64;  // rows

template <typename T>
void max_pool_rows(const T *rows, const int32_t *table, T *out, uint8_t *taken, int64_t begin, int64_t end, int64_t taps,
                   int64_t channels) {
  using Sum = at::opmath_type<T>;
  // As wide as the values, and without branches below, so that the compiler can vectorise.
  using Tap = std::conditional_t<std::is_same_v<Sum, double>, int64_t, int32_t>;
  std::vector<Sum> largest(channels);
  std::vector<Tap> from(channels);
  Sum *__restrict best = largest.data();
  Tap *__restrict tap_of_best = from.data();
  for (int64_t n = begin; n < end; ++n) {
    bool first = true;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int32_t entry = table[n * taps + tap];
      if (entry < 0) continue;
      const T *__restrict row = rows + entry * channels;
      if (first) {
        for (int64_t c = 0; c < channels; ++c) best[c] = static_cast<Sum>(row[c]);
        std::fill_n(tap_of_best, channels, static_cast<Tap>(tap));
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          const Sum value = static_cast<Sum>(row[c]);
          const bool takes = !(value <= best[c]) & (best[c] == best[c]);  // NaN takes, and is not taken from
          best[c] = takes ? value : best[c];
          tap_of_best[c] = takes ? static_cast<Tap>(tap) : tap_of_best[c];
        }
      }
      first = false;
    }
    TORCH_CHECK_VALUE(!first, "table leaves row ", n, " without a neighbour to pool");
    for (int64_t c = 0; c < channels; ++c) out[n * channels + c] = static_cast<T>(best[c]);
    for (int64_t c = 0; c < channels; ++c) taken[n * channels + c] = static_cast<uint8_t>(tap_of_best[c]);
  }
}

Pair max_pool(const Tensor &rows, const Tensor &table, const Tensor &inverse) {
  const Tensor rows_ = rows.contiguous(), table_ = table.contiguous();
  check_table("table", table_, rows_.size(0));
  const int64_t channels = rows_.size(1), taps = table_.size(1);
  Tensor out = at::empty({table_.size(0), channels}, rows_.options());
  Tensor taken = at::empty(out.sizes(), rows_.options().dtype(at::kByte));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows_.scalar_type(), "max_pool", [&] {
    at::parallel_for(0, out.size(0), kGrain, [&](int64_t begin, int64_t end) {
      max_pool_rows(rows_.const_data_ptr<scalar_t>(), table_.const_data_ptr<int32_t>(), out.mutable_data_ptr<scalar_t>(),
                    taken.mutable_data_ptr<uint8_t>(), begin, end, taps, channels);
    });
  });
  return {out, taken};
}

Tensor max_pool_grad_rows(const Tensor &grad, const Tensor &taken, const Tensor &inverse) {
  const Tensor grad_ = grad.contiguous(), taken_ = taken.contiguous(), inverse_ = inverse.contiguous();
  check_table("inverse", inverse_, grad_.size(0));
  TORCH_CHECK_VALUE(taken_.sizes() == grad_.sizes(), "taken must have the shape of grad");
  const int64_t channels = grad_.size(1), taps = inverse_.size(1);
  Tensor out = at::empty({inverse_.size(0), channels}, grad_.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, grad_.scalar_type(), "max_pool_grad_rows", [&] {
    const int32_t *entries = inverse_.const_data_ptr<int32_t>();
    const scalar_t *source = grad_.const_data_ptr<scalar_t>();
    const uint8_t *from = taken_.const_data_ptr<uint8_t>();
    scalar_t *target = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, out.size(0), kGrain, [&](int64_t begin, int64_t end) {
      std::vector<const scalar_t *> rows(taps);
      std::vector<const uint8_t *> takens(taps);
      std::vector<uint8_t> names(taps);
      for (int64_t n = begin; n < end; ++n) {
        int64_t count = 0;
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t entry = entries[n * taps + tap];
          if (entry < 0) continue;
          rows[count] = source + entry * channels;
          takens[count] = from + entry * channels;
          names[count++] = static_cast<uint8_t>(tap);
        }
        kernels_of<scalar_t>().sum_taken(rows.data(), takens.data(), names.data(), count, channels, target + n * channels);
      }
    });
  });
  return out;
}

Tensor avg_pool(const Tensor &rows, const Tensor &table, const Tensor &inverse) {
  const Tensor rows_ = rows.contiguous(), table_ = table.contiguous();
  check_table("table", table_, rows_.size(0));
  Tensor out = at::empty({table_.size(0), rows_.size(1)}, rows_.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows_.scalar_type(), "avg_pool", [&] {
    using Sum = at::opmath_type<scalar_t>;
    const int64_t channels = rows_.size(1), taps = table_.size(1);
    const Sum scale = Sum(1) / static_cast<Sum>(taps);
    const scalar_t *source = rows_.const_data_ptr<scalar_t>();
    const int32_t *entries = table_.const_data_ptr<int32_t>();
    scalar_t *target = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, out.size(0), kGrain, [&](int64_t begin, int64_t end) {
      std::vector<Sum> sums(channels);
      Sum *__restrict sum = sums.data();
      for (int64_t n = begin; n < end; ++n) {
        std::fill_n(sum, channels, Sum(0));
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int32_t entry = entries[n * taps + tap];
          if (entry < 0) continue;
          const scalar_t *__restrict row = source + entry * channels;
          for (int64_t c = 0; c < channels; ++c) sum[c] += static_cast<Sum>(row[c]);
        }
        for (int64_t c = 0; c < channels; ++c) target[n * channels + c] = static_cast<scalar_t>(sum[c] * scale);
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, CPU, m) {
  m.impl("max_pool", max_pool);
  m.impl("max_pool_grad_rows", max_pool_grad_rows);
  m.impl("avg_pool", avg_pool);
}

}  // namespace sparkme
