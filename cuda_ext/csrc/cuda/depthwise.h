// What the three ways to compute a depthwise convolution share, and how depthwise.cu calls them. Each is a translation unit of
// its own, without torch's headers.
#pragma once

#include <functional>

#include "launch.h"

namespace sparkme::cuda {

// Rows, kernels and results are contiguous. Pointers to what is not there are null.
template <typename T>
struct Depthwise {
  T *out;
  const T *rows, *kernel, *bias;
  Geometry geometry;
  int32_t channels;
  // Gives the gradient of the rows: then `rows` is the gradient of the outputs, and `out` has a row per input.
  bool transposed;
  Stream stream;
};

template <typename T>
struct DepthwiseGradKernel {
  T *out;
  const T *rows, *grad;
  Geometry geometry;
  int32_t channels;
  std::function<void *(int64_t bytes)> allocate;  // memory of the device, until the caller's work is queued
  Stream stream;
};

// For patches of whole tiles, 8 or 4 pixels along a side. This and the next take square windows of 3, 5 or 7 pixels, stride and
// dilation 1, float or bfloat16, and memory that fits the widest access.
template <typename T>
void convolve_tiles(const Depthwise<T> &call, int32_t tile);
template <typename T>
void correlate_tiles(const DepthwiseGradKernel<T> &call, int32_t tile);

// For patches of a multiple of 2 pixels.
template <typename T>
void convolve_patches(const Depthwise<T> &call);
template <typename T>
void correlate_patches(const DepthwiseGradKernel<T> &call);

// For everything. `wide`: the memory fits the widest access.
template <typename T>
void convolve_rows(const Depthwise<T> &call, bool wide);
template <typename T>
void correlate_rows(const DepthwiseGradKernel<T> &call, bool wide);

namespace {

constexpr int32_t kLanes = 32;
constexpr int32_t kLineBytes = kLanes * 4;  // of channels that a warp works on
constexpr int32_t kCopiesPerLine = kLineBytes / 16;

constexpr int32_t threads_of(int32_t warps) { return warps * kLanes; }

template <typename T>
constexpr int32_t kLineChannels = kLineBytes / sizeof(T);

// Tiles are squares that patches are cut into. `per_side` of them lie along a patch; a patch of 4 pixels is one tile of 4.
struct Tiles {
  Sites sites;
  int64_t count;
  int32_t per_side, pixels;
};

// The first row of the region (step_y, step_x) tiles away from tile `number`, or -1 where it is hidden.
template <int TILE>
__device__ __forceinline__ int64_t first_row(const Tiles &tiles, int64_t number, int32_t step_y, int32_t step_x) {
  const int32_t per_patch = tiles.per_side * tiles.per_side;
  const int32_t patch = static_cast<int32_t>(number / per_patch), within = static_cast<int32_t>(number % per_patch);
  const int32_t y = (within / tiles.per_side + step_y) * TILE, x = (within % tiles.per_side + step_x) * TILE;
  return row_at(tiles.sites, patch, y, x, tiles.pixels);
}

// A tile with its halo, in pixels and in regions of the size of a tile.
template <int K, int TILE>
struct Halo {
  static constexpr int32_t kReach = K / 2;
  static constexpr int32_t kSide = TILE + 2 * kReach;
  static constexpr int32_t kArea = kSide * kSide;
  static constexpr int32_t kRegionReach = (kReach + TILE - 1) / TILE;
  static constexpr int32_t kRegions = 2 * kRegionReach + 1;  // along a side
  static constexpr int32_t kCentre = kRegions * kRegionReach + kRegionReach;
  static_assert(kRegions * kRegions <= 32, "a bit per region");

  // Counted in pixels from the corner of the halo: in which region, and where in it.
  __device__ __forceinline__ static constexpr int32_t region(int32_t side) {
    return (side - kReach + kRegionReach * TILE) / TILE;
  }
  __device__ __forceinline__ static constexpr int32_t within(int32_t side) {
    return (side - kReach + kRegionReach * TILE) % TILE;
  }
};

// Copies piece `i` of a tile's halo, 16 bytes of one pixel, into `words`, (kArea, kLanes). What is hidden stays as it is:
// nobody reads it. The copy is done after __pipeline_wait_prior(0) and a barrier.
template <typename T, int K, int TILE>
__device__ __forceinline__ void copy_halo(uint32_t *words, const T *rows, const int64_t *first_rows, int32_t i, int32_t pixels,
                                          int32_t channels, int32_t first_channel) {
  using H = Halo<K, TILE>;
  const int32_t copy = i % kCopiesPerLine, pixel = i / kCopiesPerLine;
  const int32_t y = pixel / H::kSide, x = pixel % H::kSide;
  const int64_t region = first_rows[H::region(y) * H::kRegions + H::region(x)];
  const int32_t channel = first_channel + copy * kWidest<T>;
  if (region < 0 || channel >= channels) return;
  const int64_t row = region + H::within(y) * pixels + H::within(x);
  __pipeline_memcpy_async(words + pixel * kLanes + copy * 4, rows + row * channels + channel, 16);
}

constexpr int32_t kReduceLanes = 32, kReduceParts = 8;

template <typename A>
struct ReduceShared {
  A sums[kReduceParts][kReduceLanes];
};

// out[i] = the sum of partial[:, i].
template <typename T>
__global__ void sum_partials(T *out, const Sum<T> *partial, int32_t count, int64_t size) {
  SPARKME_SHARED(ReduceShared<Sum<T>>, shared);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceLanes + threadIdx.x;
  Sum<T> sum = 0;
  if (i < size) {
    for (int32_t part = threadIdx.y; part < count; part += kReduceParts) sum += partial[part * size + i];
  }
  shared.sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= size) return;
  for (int32_t part = 1; part < kReduceParts; ++part) sum += shared.sums[part][threadIdx.x];
  out[i] = static_cast<T>(sum);
}

// Memory for the sums of so many blocks, (blocks, taps, channels).
template <typename T>
Sum<T> *allocate_partial(const DepthwiseGradKernel<T> &call, int64_t blocks) {
  return static_cast<Sum<T> *>(call.allocate(blocks * call.geometry.window.taps() * call.channels * sizeof(Sum<T>)));
}

template <typename T>
void reduce(const DepthwiseGradKernel<T> &call, const Sum<T> *partial, int64_t blocks) {
  const int64_t size = int64_t{call.geometry.window.taps()} * call.channels;
  SPARKME_LAUNCH(sum_partials<T>, dim3(ceil_div(size, kReduceLanes)), dim3(kReduceLanes, kReduceParts), call.stream, call.out,
                 partial, static_cast<int32_t>(blocks), size);
}

// Calls f with the window's side as a constant.
template <typename F>
void with_kernel(int32_t kernel, F f) {
  if (kernel == 3) f(std::integral_constant<int, 3>());
  if (kernel == 5) f(std::integral_constant<int, 5>());
  if (kernel == 7) f(std::integral_constant<int, 7>());
}

// Blocks that share `work` pieces: as many as fit on the device at a time, times `waves`, so that each does several pieces
// with the weights it has loaded.
inline int64_t blocks_for(int64_t work, int64_t lines, const Geometry &geometry, int32_t per_multiprocessor, int32_t waves) {
  const int64_t resident = static_cast<int64_t>(geometry.multiprocessors) * per_multiprocessor * waves;
  return std::max<int64_t>(1, std::min(work, ceil_div(resident, lines)));
}

inline Tiles tiles_of(const Geometry &geometry, int32_t tile) {
  const int32_t per_side = geometry.pixels / tile;
  return {geometry.sites, geometry.patches * per_side * per_side, per_side, geometry.pixels};
}

}  // namespace
}  // namespace sparkme::cuda
