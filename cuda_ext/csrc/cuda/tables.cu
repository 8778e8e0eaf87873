// Neighbour tables.
#include "tensors.h"

namespace sparkme::cuda {
namespace {

constexpr int32_t kTableRows = 64;    // of a block
constexpr int32_t kTableTaps = 1024;  // that a block keeps the offsets of; those of larger windows are worked out each time

// What would cost a division for every entry.
struct Places {
  int32_t patch[kTableRows], y[kTableRows], x[kTableRows];  // of the block's rows
  int32_t down[kTableTaps], across[kTableTaps];             // from an output pixel's place in the input to what it reads
};

// Neighbouring threads write neighbouring entries.
__global__ void fill_table(int32_t *table, Sites sites, Window window, int64_t num_rows, int32_t pixels, bool transposed) {
  SPARKME_SHARED(Places, places);
  const int32_t side = transposed ? pixels : pixels / window.stride, taps = window.taps();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTableRows;
  const int32_t rows = static_cast<int32_t>(num_rows - first < kTableRows ? num_rows - first : kTableRows);
  for (int32_t i = threadIdx.x; i < rows; i += kThreads) {
    const int32_t row = static_cast<int32_t>(first + i), pixel = row % (side * side);
    places.patch[i] = row / (side * side);
    places.y[i] = pixel / side;
    places.x[i] = pixel % side;
  }
  for (int32_t tap = threadIdx.x; tap < taps && tap < kTableTaps; tap += kThreads) {
    places.down[tap] = window.down(tap);
    places.across[tap] = window.across(tap);
  }
  __syncthreads();
  const int32_t step_rows = kThreads / taps, step_taps = kThreads % taps;
  int32_t row = threadIdx.x / taps, tap = threadIdx.x % taps;
  for (int32_t i = threadIdx.x; i < rows * taps; i += kThreads) {
    const int32_t down = tap < kTableTaps ? places.down[tap] : window.down(tap);
    const int32_t across = tap < kTableTaps ? places.across[tap] : window.across(tap);
    const int32_t patch = places.patch[row], y = places.y[row], x = places.x[row];
    const int64_t found = transposed ? output_row(sites, window, patch, y - down, x - across, pixels)
                                     : row_at(sites, patch, y * window.stride + down, x * window.stride + across, pixels);
    table[first * taps + i] = static_cast<int32_t>(found);
    row += step_rows;
    tap += step_taps;
    if (tap >= taps) {
      tap -= taps;
      ++row;
    }
  }
}

at::Tensor neighbour_table(const at::Tensor &slots, const at::Tensor &patches, int64_t pixels, at::IntArrayRef kernel_size,
                           int64_t stride, int64_t dilation, bool transposed) {
  const auto guard = on_device_of(slots, patches);
  const at::Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, kernel_size, stride, dilation);
  const int64_t side = transposed ? pixels : pixels / stride;
  at::Tensor table = at::empty({geometry.patches * side * side, geometry.window.taps()}, slots_.options());
  const int64_t num_rows = table.size(0);
  if (num_rows == 0) return table;
  SPARKME_LAUNCH(fill_table, dim3(ceil_div(num_rows, kTableRows)), dim3(kThreads), current_stream(),
                 table.mutable_data_ptr<int32_t>(), geometry.sites, geometry.window, num_rows, geometry.pixels, transposed);
  return table;
}

}  // namespace

TORCH_LIBRARY_IMPL(SPARKME_LIBRARY, SPARKME_KEY, m) { m.impl("neighbour_table", neighbour_table); }

}  // namespace sparkme::cuda
