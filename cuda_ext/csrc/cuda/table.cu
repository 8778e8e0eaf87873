// Neighbour tables.
#include "operators.h"

namespace sparkme::cuda {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kRows = 64;    // of a block
constexpr int32_t kTaps = 1024;  // that a block keeps the offsets of; those of larger windows are worked out each time

// What would cost a division for every entry.
struct Places {
  int32_t patch[kRows], y[kRows], x[kRows];  // of the block's rows
  int32_t down[kTaps], across[kTaps];        // from an output pixel's place in the input to what it reads
};

// Neighbouring threads write neighbouring entries.
__global__ void fill_table(int32_t *table, Sites sites, Window window, int64_t num_rows, int32_t pixels, bool transposed) {
  SPARKME_SHARED(Places, places);
  const int32_t side = transposed ? pixels : pixels / window.stride, taps = window.taps();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const int32_t rows = static_cast<int32_t>(num_rows - first < kRows ? num_rows - first : kRows);
  for (int32_t i = threadIdx.x; i < rows; i += kThreads) {
    const int32_t row = static_cast<int32_t>(first + i), pixel = row % (side * side);
    places.patch[i] = row / (side * side);
    places.y[i] = pixel / side;
    places.x[i] = pixel % side;
  }
  for (int32_t tap = threadIdx.x; tap < taps && tap < kTaps; tap += kThreads) {
    places.down[tap] = window.down(tap);
    places.across[tap] = window.across(tap);
  }
  __syncthreads();
  const int32_t step_rows = kThreads / taps, step_taps = kThreads % taps;
  int32_t row = threadIdx.x / taps, tap = threadIdx.x % taps;
  for (int32_t i = threadIdx.x; i < rows * taps; i += kThreads) {
    const int32_t down = tap < kTaps ? places.down[tap] : window.down(tap);
    const int32_t across = tap < kTaps ? places.across[tap] : window.across(tap);
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

}  // namespace

void neighbour_table(int32_t *table, const Geometry &geometry, bool transposed, Stream stream) {
  const int64_t side = transposed ? geometry.pixels : geometry.pixels / geometry.window.stride;
  const int64_t num_rows = geometry.patches * side * side;
  if (num_rows == 0) return;
  SPARKME_LAUNCH(fill_table, dim3(ceil_div(num_rows, kRows)), dim3(kThreads), stream, table, geometry.sites, geometry.window,
                 num_rows, geometry.pixels, transposed);
}

}  // namespace sparkme::cuda
