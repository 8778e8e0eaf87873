// Between dense maps and the rows of visible patches: copies there and back, and neighbour tables, which name for every row and
// tap of a window the row on the other side of the convolution.
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

Tensor neighbour_table(const Tensor &slots, const Tensor &patches, int64_t pixels, Sizes kernel_size, int64_t stride,
                       int64_t dilation, bool transposed) {
  const auto guard = on_device_of(slots, patches);
  const Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, kernel_size, stride, dilation);
  const int64_t side = transposed ? pixels : pixels / stride;
  Tensor table = at::empty({geometry.patches * side * side, geometry.window.taps()}, slots_.options());
  const int64_t num_rows = table.size(0);
  if (num_rows == 0) return table;
  SPARKME_LAUNCH(fill_table, dim3(ceil_div(num_rows, kTableRows)), dim3(kThreads), current_stream(),
                 table.mutable_data_ptr<int32_t>(), geometry.sites, geometry.window, num_rows, geometry.pixels, transposed);
  return table;
}

// The map of a batch, in any memory format.
template <typename T>
struct Dense {
  T *data;
  int64_t stride_sample, stride_channel, stride_y, stride_x;  // in elements
};

// The first pixel of a visible patch in its image.
__device__ __forceinline__ int64_t corner_of(const Sites &sites, int32_t patch, int32_t pixels, int64_t stride_sample,
                                             int64_t stride_y, int64_t stride_x) {
  const int32_t cells = sites.f_h * sites.f_w, place = sites.patches[patch], cell = place % cells;
  return place / cells * stride_sample + static_cast<int64_t>(cell / sites.f_w) * pixels * stride_y +
         static_cast<int64_t>(cell % sites.f_w) * pixels * stride_x;
}

template <typename T>
__device__ __forceinline__ const T *pixel_of(const Dense<const T> &dense, const Sites &sites, int64_t row, int32_t pixels) {
  const int32_t area = pixels * pixels, within = static_cast<int32_t>(row % area);
  const int64_t corner =
      corner_of(sites, static_cast<int32_t>(row / area), pixels, dense.stride_sample, dense.stride_y, dense.stride_x);
  return dense.data + corner + within / pixels * dense.stride_y + within % pixels * dense.stride_x;
}

// channels_last: the channels of a pixel lie together, in the map as in the row.
template <typename T, int V>
__global__ void copy_pixels(T *rows, Dense<const T> dense, Sites sites, int64_t num_rows, int32_t pixels, int32_t channels) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  const T *from = pixel_of(dense, sites, row, pixels);
  for (int32_t c = threadIdx.x * V; c < channels; c += blockDim.x * V) {
    store_pack<T, V>(rows + row * channels + c, load_pack<T, V>(from + c));
  }
}

constexpr int32_t kTilePixels = 64, kTileChannels = 32;

template <typename T>
struct Transposed {
  T values[kTilePixels][kTileChannels + 1];  // one more, so that a column does not lie in one bank
};

// Any other memory: a tile is read along x, where the pixels of an NCHW map lie together, and written along channels.
template <typename T>
__global__ void transpose_pixels(T *rows, Dense<const T> dense, Sites sites, int64_t num_rows, int32_t pixels,
                                 int32_t channels) {
  SPARKME_SHARED(Transposed<T>, tile);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTilePixels;
  const int32_t first_channel = blockIdx.y * kTileChannels;
  const int32_t here = static_cast<int32_t>(num_rows - first < kTilePixels ? num_rows - first : kTilePixels);
  const int32_t width = channels - first_channel < kTileChannels ? channels - first_channel : kTileChannels;
  const int32_t pixel = threadIdx.x % kTilePixels;
  if (pixel < here) {
    const T *from = pixel_of(dense, sites, first + pixel, pixels) + first_channel * dense.stride_channel;
    for (int32_t c = threadIdx.x / kTilePixels; c < width; c += kThreads / kTilePixels) {
      tile.values[pixel][c] = from[c * dense.stride_channel];
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < here * width; i += kThreads) {
    rows[(first + i / width) * channels + first_channel + i % width] = tile.values[i / width][i % width];
  }
}

template <typename T, int V>
__global__ void fill_map(T *dense, const T *rows, const T *fill, Sites sites, int64_t num_pixels, int32_t pixels,
                         int32_t channels) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (place >= num_pixels) return;
  const int32_t width = sites.f_w * pixels, height = sites.f_h * pixels;
  const int32_t x = static_cast<int32_t>(place % width), y = static_cast<int32_t>(place / width % height);
  const int64_t sample = place / width / height;
  const int64_t slot = sites.slots[(sample * sites.f_h + y / pixels) * sites.f_w + x / pixels];
  const T *from = slot < 0 ? fill : rows + ((slot * pixels + y % pixels) * pixels + x % pixels) * channels;
  for (int32_t c = threadIdx.x * V; c < channels; c += blockDim.x * V) {
    Pack<T, V> pack;
    if (from) {
      pack = load_pack<T, V>(from + c);
    } else {
      for (int v = 0; v < V; ++v) pack.values[v] = static_cast<T>(0.f);
    }
    store_pack<T, V>(dense + place * channels + c, pack);
  }
}

template <typename T>
void copy_patches(T *rows, const Dense<const T> &dense, const Sites &sites, int64_t num_rows, int32_t pixels,
                  int32_t channels) {
  if (num_rows == 0 || channels == 0) return;
  if (dense.stride_channel != 1) {
    const dim3 grid(ceil_div(num_rows, kTilePixels), ceil_div(channels, kTileChannels));
    SPARKME_LAUNCH(transpose_pixels<T>, grid, dim3(kThreads), current_stream(), rows, dense, sites, num_rows, pixels, channels);
    return;
  }
  constexpr int kWide = kWidest<T>;
  const bool aligned = dense.stride_x % kWide == 0 && dense.stride_y % kWide == 0 && dense.stride_sample % kWide == 0;
  const bool wide = aligned && fits_widest<T>(channels, rows, dense.data);
  const dim3 block = row_block(wide ? channels / kWide : channels, kThreads), grid(ceil_div(num_rows, block.y));
  if (wide) {
    SPARKME_LAUNCH((copy_pixels<T, kWide>), grid, block, current_stream(), rows, dense, sites, num_rows, pixels, channels);
  } else {
    SPARKME_LAUNCH((copy_pixels<T, 1>), grid, block, current_stream(), rows, dense, sites, num_rows, pixels, channels);
  }
}

Tensor voxelise(const Tensor &dense, const Tensor &slots, const Tensor &patches, int64_t pixels) {
  const auto guard = on_device_of(dense, slots, patches);
  const Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, {1, 1}, 1, 1);
  const Sites &sites = geometry.sites;
  TORCH_CHECK_VALUE(dense.dim() == 4 && dense.size(0) == slots_.size(0) && dense.size(2) == sites.f_h * pixels &&
                        dense.size(3) == sites.f_w * pixels,
                    "dense ", dense.sizes(), " does not fit slots ", slots_.sizes(), " of pixels=", pixels);
  Tensor rows = at::empty({geometry.patches * pixels * pixels, dense.size(1)}, dense.options());
  with_type(dense.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    // With one channel its stride is of no account, and copying pixels as they are is the faster way.
    const Dense<const T> map = {dense.const_data_ptr<T>(), dense.stride(0), dense.size(1) == 1 ? 1 : dense.stride(1),
                                dense.stride(2), dense.stride(3)};
    copy_patches<T>(rows.mutable_data_ptr<T>(), map, sites, rows.size(0), geometry.pixels, channels_of(dense));
  });
  return rows;
}

Tensor densify(const Tensor &rows, const Tensor &slots, const Tensor &patches, int64_t pixels, const Optional &fill) {
  const auto guard = on_device_of(rows, slots, patches);
  const Tensor rows_ = rows.contiguous(), slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, {1, 1}, 1, 1);
  const Sites &sites = geometry.sites;
  check_rows("rows", rows_, geometry.patches * pixels * pixels);
  Tensor background;
  if (fill) {
    TORCH_CHECK_VALUE(fill->dim() == 1 && fill->size(0) == rows_.size(1) && fill->device() == rows_.device(), "fill must be (",
                      rows_.size(1), ",) on ", rows_.device(), ", got ", fill->sizes(), " on ", fill->device());
    background = fill->to(rows_.scalar_type()).contiguous();
  }
  Tensor dense = at::empty({slots_.size(0), sites.f_h * pixels, sites.f_w * pixels, rows_.size(1)}, rows_.options());
  with_width({dense, rows_, background}, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const int64_t num_pixels = dense.numel() / rows_.size(1);
    const dim3 block = row_block(rows_.size(1) / V, kThreads), grid(ceil_div(num_pixels, block.y));
    SPARKME_LAUNCH((fill_map<T, V>), grid, block, current_stream(), dense.mutable_data_ptr<T>(), rows_.const_data_ptr<T>(),
                   data_or_null<T>(background), sites, num_pixels, geometry.pixels, channels_of(rows_));
  });
  return dense.permute({0, 3, 1, 2});
}

}  // namespace

TORCH_LIBRARY_IMPL(SPARKME_LIBRARY, SPARKME_KEY, m) {
  m.impl("neighbour_table", neighbour_table);
  m.impl("voxelise", voxelise);
  m.impl("densify", densify);
}

}  // namespace sparkme::cuda
