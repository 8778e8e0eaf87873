// Neighbour tables.
#include "operators.h"

namespace sparkme::cuda {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kRows = 64;  // of a block

// Neighbouring threads write neighbouring entries.
__global__ void fill_table(int32_t *table, Sites sites, Window window, int64_t num_rows, int32_t pixels, bool transposed) {
  const int32_t side = transposed ? pixels : pixels / window.stride;
  const int32_t taps = window.taps();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const int32_t entries = static_cast<int32_t>(num_rows - first < kRows ? num_rows - first : kRows) * taps;
  for (int32_t i = threadIdx.x; i < entries; i += kThreads) {
    const int32_t row = static_cast<int32_t>(first + i / taps), tap = i % taps;
    const int32_t patch = row / (side * side), y = row / side % side, x = row % side;
    const int64_t found =
        transposed ? output_row(sites, window, patch, y, x, tap, pixels) : input_row(sites, window, patch, y, x, tap, pixels);
    table[first * taps + i] = static_cast<int32_t>(found);
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
