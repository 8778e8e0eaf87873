// Dense maps to rows and back, patch by patch.
#include "operators.h"

namespace sparkme::cuda {
namespace {

constexpr int32_t kThreads = 256;

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

}  // namespace

template <typename T>
void voxelise(T *rows, const Dense<const T> &dense, const Sites &sites, int64_t patches, int32_t pixels, int32_t channels,
              Stream stream) {
  const int64_t num_rows = patches * pixels * pixels;
  if (num_rows == 0 || channels == 0) return;
  if (dense.stride_channel != 1) {
    const dim3 grid(ceil_div(num_rows, kTilePixels), ceil_div(channels, kTileChannels));
    SPARKME_LAUNCH(transpose_pixels<T>, grid, dim3(kThreads), stream, rows, dense, sites, num_rows, pixels, channels);
    return;
  }
  constexpr int kWide = kWidest<T>;
  const bool aligned = dense.stride_x % kWide == 0 && dense.stride_y % kWide == 0 && dense.stride_sample % kWide == 0;
  const bool wide = aligned && fits_widest<T>(channels, rows, dense.data);
  const dim3 block = row_block(wide ? channels / kWide : channels, kThreads), grid(ceil_div(num_rows, block.y));
  if (wide) {
    SPARKME_LAUNCH((copy_pixels<T, kWide>), grid, block, stream, rows, dense, sites, num_rows, pixels, channels);
  } else {
    SPARKME_LAUNCH((copy_pixels<T, 1>), grid, block, stream, rows, dense, sites, num_rows, pixels, channels);
  }
}

template <typename T>
void densify(T *dense, const T *rows, const T *fill, const Sites &sites, int64_t samples, int32_t pixels, int32_t channels,
             Stream stream) {
  const int64_t num_pixels = samples * sites.f_h * sites.f_w * pixels * pixels;
  if (num_pixels == 0 || channels == 0) return;
  const bool wide = fits_widest<T>(channels, dense, rows, fill);
  const dim3 block = row_block(wide ? channels / kWidest<T> : channels, kThreads), grid(ceil_div(num_pixels, block.y));
  if (wide) {
    SPARKME_LAUNCH((fill_map<T, kWidest<T>>), grid, block, stream, dense, rows, fill, sites, num_pixels, pixels, channels);
  } else {
    SPARKME_LAUNCH((fill_map<T, 1>), grid, block, stream, dense, rows, fill, sites, num_pixels, pixels, channels);
  }
}

#define SPARKME_INSTANTIATE(T)                                                                              \
  template void voxelise<T>(T *, const Dense<const T> &, const Sites &, int64_t, int32_t, int32_t, Stream); \
  template void densify<T>(T *, const T *, const T *, const Sites &, int64_t, int32_t, int32_t, Stream);
SPARKME_INSTANTIATE(double)
SPARKME_INSTANTIATE(float)
SPARKME_INSTANTIATE(c10::BFloat16)
#undef SPARKME_INSTANTIATE

}  // namespace sparkme::cuda
