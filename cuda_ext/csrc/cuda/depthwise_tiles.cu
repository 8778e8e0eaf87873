// Depthwise convolution of patches of 8 or 4 pixels, tile by tile. See depthwise.cu.
#include "depthwise.h"

namespace sparkme::cuda {
namespace {

constexpr int32_t kTileWarps = 4;
constexpr int32_t kTileLines = 2;  // of outputs per warp

template <int TILE>
constexpr int32_t kTilesAtOnce = kTileWarps * kTileLines / TILE;

template <typename T, int K, int TILE>
struct TileShared {
  alignas(16) uint32_t words[kTilesAtOnce<TILE>][Halo<K, TILE>::kArea * kLanes];
  float weights[K * K][kLanes * Word<T>::kChannels];  // (y, x) row-major
  int64_t first_rows[kTilesAtOnce<TILE>][9];
};

// Bit r is set where region r is visible.
template <int REGIONS>
__device__ __forceinline__ uint32_t visible_regions(const int64_t *first_rows) {
  uint32_t bits = 0;
#pragma unroll
  for (int32_t r = 0; r < REGIONS; ++r) bits |= static_cast<uint32_t>(first_rows[r] >= 0) << r;
  return bits;
}

// Finds the regions of the tiles [first, first + at_once), by the threads of a block.
template <int TILE>
__device__ __forceinline__ void find_regions(int64_t (*first_rows)[9], const Tiles &tiles, int64_t first, int32_t at_once,
                                             int32_t thread) {
  if (thread >= at_once * 9) return;
  const int32_t which = thread / 9, region = thread % 9;
  const bool exists = first + which < tiles.count;
  first_rows[which][region] = exists ? first_row<TILE>(tiles, first + which, region / 3 - 1, region % 3 - 1) : -1;
}

// Calls f(x, values) for the visible pixels of line y of the halo, x counted from its corner. `visible` has a bit per region.
template <typename T, int K, int TILE, typename F>
__device__ __forceinline__ void for_line(const uint32_t *words, int32_t y, uint32_t visible, int32_t lane, F f) {
  using H = Halo<K, TILE>;
  const uint32_t *line = words + y * H::kSide * kLanes + lane;
  const uint32_t bits = visible >> (3 * H::region(y));
#pragma unroll
  for (int32_t region = 0; region < 3; ++region) {
    if (!(bits >> region & 1)) continue;  // the same for the whole warp
#pragma unroll
    for (int32_t x = 0; x < H::kSide; ++x) {
      if (H::region(x) != region) continue;
      float values[Word<T>::kChannels];
      Word<T>::unpack(line[x * kLanes], values);
      f(x, values);
    }
  }
}

template <typename T, int K, int TILE>
__global__ void __launch_bounds__(threads_of(kTileWarps))
    conv_tiles(T *out, const T *rows, const T *kernel, const T *bias, Tiles tiles, int32_t channels, bool flip) {
  using H = Halo<K, TILE>;
  using S = TileShared<T, K, TILE>;
  static_assert(H::kRegions == 3, "the halo is not wider than a tile");
  constexpr int32_t kAtOnce = kTilesAtOnce<TILE>, N = Word<T>::kChannels, kThreads = kTileWarps * kLanes;
  SPARKME_SHARED(S, shared);
  const int32_t thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes;
  const int32_t first_channel = blockIdx.y * kLineChannels<T>, channel = first_channel + lane * N;
  const int32_t which = warp * kTileLines / TILE, top = warp * kTileLines % TILE;

  for (int32_t i = thread; i < K * K * kLanes * N; i += kThreads) {
    const int32_t tap = i / (kLanes * N), c = first_channel + i % (kLanes * N);
    const int32_t place = flip ? K * K - 1 - tap : tap;
    shared.weights[place % K * K + place / K][i % (kLanes * N)] =
        c < channels ? static_cast<float>(kernel[tap * channels + c]) : 0.f;
  }
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kAtOnce; first < tiles.count;
       first += static_cast<int64_t>(gridDim.x) * kAtOnce) {
    find_regions<TILE>(shared.first_rows, tiles, first, kAtOnce, thread);
    __syncthreads();
    for (int32_t i = thread; i < kAtOnce * H::kArea * kCopiesPerLine; i += kThreads) {
      const int32_t tile = i / (H::kArea * kCopiesPerLine);
      copy_halo<T, K, TILE>(shared.words[tile], rows, shared.first_rows[tile], i % (H::kArea * kCopiesPerLine), tiles.pixels,
                            channels, first_channel);
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    if (first + which < tiles.count && channel < channels) {
      const uint32_t visible = visible_regions<9>(shared.first_rows[which]);
      float start[N] = {};
      if (bias) Word<T>::unpack(*reinterpret_cast<const uint32_t *>(bias + channel), start);
      float sums[kTileLines][TILE][N];
#pragma unroll
      for (int32_t i = 0; i < kTileLines * TILE * N; ++i) sums[i / (TILE * N)][i / N % TILE][i % N] = start[i % N];
#pragma unroll 1
      for (int32_t dy = 0; dy < K; ++dy) {
        float weights[K][N];
#pragma unroll
        for (int32_t dx = 0; dx < K; ++dx) {
#pragma unroll
          for (int32_t n = 0; n < N; ++n) weights[dx][n] = shared.weights[dy * K + dx][lane * N + n];
        }
#pragma unroll
        for (int32_t line = 0; line < kTileLines; ++line) {
          for_line<T, K, TILE>(shared.words[which], top + line + dy, visible, lane, [&](int32_t x, const float *values) {
#pragma unroll
            for (int32_t dx = 0; dx < K; ++dx) {
              if (x - dx < 0 || x - dx >= TILE) continue;
#pragma unroll
              for (int32_t n = 0; n < N; ++n) sums[line][x - dx][n] += values[n] * weights[dx][n];
            }
          });
        }
      }
      const int64_t centre = shared.first_rows[which][H::kCentre];
#pragma unroll
      for (int32_t line = 0; line < kTileLines; ++line) {
#pragma unroll
        for (int32_t x = 0; x < TILE; ++x) {
          const int64_t row = centre + (top + line) * tiles.pixels + x;
          *reinterpret_cast<uint32_t *>(out + row * channels + channel) = Word<T>::pack(sums[line][x]);
        }
      }
    }
    __syncthreads();
  }
}

template <int TILE>
constexpr int32_t kGradTilesAtOnce = 8 / TILE;

template <typename T, int K, int TILE>
struct TileGradShared {
  alignas(16) uint32_t words[kGradTilesAtOnce<TILE>][Halo<K, TILE>::kArea * kLanes];
  alignas(16) uint32_t grads[kGradTilesAtOnce<TILE>][TILE * TILE * kLanes];
  int64_t first_rows[kGradTilesAtOnce<TILE>][9];
};

// Warp dy sums the weights' gradient in line dy of the window.
template <typename T, int K, int TILE>
__global__ void __launch_bounds__(threads_of(K))
    grad_tiles(float *partial, const T *rows, const T *grad, Tiles tiles, int32_t channels) {
  using H = Halo<K, TILE>;
  using S = TileGradShared<T, K, TILE>;
  constexpr int32_t kAtOnce = kGradTilesAtOnce<TILE>, N = Word<T>::kChannels, kThreads = K * kLanes;
  constexpr int32_t kCopies = H::kArea * kCopiesPerLine, kGradCopies = TILE * TILE * kCopiesPerLine;
  static_assert(kThreads >= kAtOnce * 9, "a thread per region");
  SPARKME_SHARED(S, shared);
  const int32_t thread = threadIdx.x, lane = thread % kLanes, dy = thread / kLanes;
  const int32_t first_channel = blockIdx.y * kLineChannels<T>, channel = first_channel + lane * N;

  float sums[K][N] = {};
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kAtOnce; first < tiles.count;
       first += static_cast<int64_t>(gridDim.x) * kAtOnce) {
    find_regions<TILE>(shared.first_rows, tiles, first, kAtOnce, thread);
    __syncthreads();
    for (int32_t i = thread; i < kAtOnce * kCopies; i += kThreads) {
      copy_halo<T, K, TILE>(shared.words[i / kCopies], rows, shared.first_rows[i / kCopies], i % kCopies, tiles.pixels,
                            channels, first_channel);
    }
    for (int32_t i = thread; i < kAtOnce * kGradCopies; i += kThreads) {
      const int64_t centre = shared.first_rows[i / kGradCopies][H::kCentre];
      const int32_t copy = i % kCopiesPerLine, pixel = i % kGradCopies / kCopiesPerLine;
      const int32_t c = first_channel + copy * kWidest<T>;
      if (centre < 0 || c >= channels) continue;
      const int64_t row = centre + pixel / TILE * tiles.pixels + pixel % TILE;
      __pipeline_memcpy_async(&shared.grads[i / kGradCopies][pixel * kLanes + copy * 4], grad + row * channels + c, 16);
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    for (int32_t which = 0; which < kAtOnce && first + which < tiles.count && channel < channels; ++which) {
      const uint32_t visible = visible_regions<9>(shared.first_rows[which]);
#pragma unroll 1
      for (int32_t y = 0; y < TILE; ++y) {
        float grads[TILE][N];
#pragma unroll
        for (int32_t x = 0; x < TILE; ++x) Word<T>::unpack(shared.grads[which][(y * TILE + x) * kLanes + lane], grads[x]);
        for_line<T, K, TILE>(shared.words[which], y + dy, visible, lane, [&](int32_t x, const float *values) {
#pragma unroll
          for (int32_t dx = 0; dx < K; ++dx) {
            if (x - dx < 0 || x - dx >= TILE) continue;
#pragma unroll
            for (int32_t n = 0; n < N; ++n) sums[dx][n] += values[n] * grads[x - dx][n];
          }
        });
      }
    }
    __syncthreads();
  }
  if (channel >= channels) return;
#pragma unroll
  for (int32_t dx = 0; dx < K; ++dx) {
    float *to = partial + (static_cast<int64_t>(blockIdx.x) * K * K + dx * K + dy) * channels + channel;
#pragma unroll
    for (int32_t n = 0; n < N; ++n) to[n] = sums[dx][n];
  }
}

template <typename T, int TILE>
void launch_conv(const Depthwise<T> &call) {
  const Tiles tiles = tiles_of(call.geometry, TILE);
  const int64_t lines = ceil_div(call.channels, kLineChannels<T>);
  with_kernel(call.geometry.window.height, [&](auto constant) {
    constexpr int K = decltype(constant)::value;
    static const int32_t at_a_time = blocks_at_a_time(&conv_tiles<T, K, TILE>, threads_of(kTileWarps));
    const dim3 grid(blocks_for(ceil_div(tiles.count, kTilesAtOnce<TILE>), lines, call.geometry, at_a_time, 2), lines);
    // With stride 1 an output and an input are each other's neighbours through opposite taps.
    SPARKME_LAUNCH((conv_tiles<T, K, TILE>), grid, dim3(threads_of(kTileWarps)), call.stream, call.out, call.rows, call.kernel,
                   call.bias, tiles, call.channels, call.transposed);
  });
}

template <typename T, int TILE>
void launch_grad(const DepthwiseGradKernel<T> &call) {
  const Tiles tiles = tiles_of(call.geometry, TILE);
  const int64_t lines = ceil_div(call.channels, kLineChannels<T>);
  with_kernel(call.geometry.window.height, [&](auto constant) {
    constexpr int K = decltype(constant)::value;
    static const int32_t at_a_time = blocks_at_a_time(&grad_tiles<T, K, TILE>, threads_of(K));
    const int64_t work = ceil_div(tiles.count, kGradTilesAtOnce<TILE>);
    const int64_t blocks = blocks_for(work, lines, call.geometry, at_a_time, 1);
    float *const partial = allocate_partial(call, blocks);
    SPARKME_LAUNCH((grad_tiles<T, K, TILE>), dim3(blocks, lines), dim3(threads_of(K)), call.stream, partial, call.rows,
                   call.grad, tiles, call.channels);
    reduce(call, partial, blocks);
  });
}

}  // namespace

template <typename T>
void convolve_tiles(const Depthwise<T> &call, int32_t tile) {
  tile == 8 ? launch_conv<T, 8>(call) : launch_conv<T, 4>(call);
}

template <typename T>
void correlate_tiles(const DepthwiseGradKernel<T> &call, int32_t tile) {
  tile == 8 ? launch_grad<T, 8>(call) : launch_grad<T, 4>(call);
}

template void convolve_tiles(const Depthwise<float> &, int32_t);
template void convolve_tiles(const Depthwise<c10::BFloat16> &, int32_t);
template void correlate_tiles(const DepthwiseGradKernel<float> &, int32_t);
template void correlate_tiles(const DepthwiseGradKernel<c10::BFloat16> &, int32_t);

}  // namespace sparkme::cuda
