// Dense maps to rows and back, patch by patch.
#include "tensors.h"

namespace sparkme::cuda {
namespace {

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

at::Tensor voxelise(const at::Tensor &dense, const at::Tensor &slots, const at::Tensor &patches, int64_t pixels) {
  const auto guard = on_device_of(dense, slots, patches);
  const at::Tensor slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, {1, 1}, 1, 1);
  const Sites &sites = geometry.sites;
  TORCH_CHECK_VALUE(dense.dim() == 4 && dense.size(0) == slots_.size(0) && dense.size(2) == sites.f_h * pixels &&
                        dense.size(3) == sites.f_w * pixels,
                    "dense ", dense.sizes(), " does not fit slots ", slots_.sizes(), " of pixels=", pixels);
  at::Tensor rows = at::empty({geometry.patches * pixels * pixels, dense.size(1)}, dense.options());
  with_type(dense.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    // With one channel its stride is of no account, and copying pixels as they are is the faster way.
    const Dense<const T> map = {dense.const_data_ptr<T>(), dense.stride(0), dense.size(1) == 1 ? 1 : dense.stride(1),
                                dense.stride(2), dense.stride(3)};
    copy_patches<T>(rows.mutable_data_ptr<T>(), map, sites, rows.size(0), geometry.pixels, channels_of(dense));
  });
  return rows;
}

at::Tensor densify(const at::Tensor &rows, const at::Tensor &slots, const at::Tensor &patches, int64_t pixels,
                   const Optional &fill) {
  const auto guard = on_device_of(rows, slots, patches);
  const at::Tensor rows_ = rows.contiguous(), slots_ = slots.contiguous(), patches_ = patches.contiguous();
  const Geometry geometry = geometry_of(slots_, patches_, pixels, {1, 1}, 1, 1);
  const Sites &sites = geometry.sites;
  check_rows("rows", rows_, geometry.patches * pixels * pixels);
  at::Tensor background;
  if (fill) {
    TORCH_CHECK_VALUE(fill->dim() == 1 && fill->size(0) == rows_.size(1) && fill->device() == rows_.device(), "fill must be (",
                      rows_.size(1), ",) on ", rows_.device(), ", got ", fill->sizes(), " on ", fill->device());
    background = fill->to(rows_.scalar_type()).contiguous();
  }
  at::Tensor dense = at::empty({slots_.size(0), sites.f_h * pixels, sites.f_w * pixels, rows_.size(1)}, rows_.options());
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
  m.impl("voxelise", voxelise);
  m.impl("densify", densify);
}

}  // namespace sparkme::cuda
