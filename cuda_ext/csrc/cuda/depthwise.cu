// Depthwise convolution of patch-major rows.
//
// Three ways to compute one thing, chosen by the size of a patch:
//
//   8 and 4 pixels   A block copies a tile of 8x8 or 4x4 pixels and its halo into shared memory, 128 bytes of channels wide. A
//                    lane keeps one word of channels and sums two lines of outputs in registers.
//   2 pixels         Nearly all that a window reads lies in other patches, of which most are hidden. A warp takes a patch of
//                    its own, with all weights in registers, and steps over hidden neighbours as a whole.
//   anything else    A block finds the neighbours of a few rows, then sums over those that are visible. Any patch, window,
//                    stride and number of channels; with one pixel per patch it is also the fastest.
//
// All sums are in float32 (float64 for float64). The weights' gradient is summed in an order that only the sizes and the device
// decide: every block sums its share, a second kernel sums the blocks.
#include "operators.h"

namespace sparkme::cuda {
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

// ------------------------------------------------------------------------------------------- tiles of 8 and 4 pixels

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

// ------------------------------------------------------------------------------------------------- patches of 2 pixels

constexpr int32_t kPatchWarps = 4;
constexpr uint32_t kWholeWarp = 0xffffffffu;

template <int K>
struct PatchShared {
  alignas(16) uint32_t words[kPatchWarps][Halo<K, 2>::kArea * kLanes];
  int64_t first_rows[kPatchWarps][32];
};

// Copies patch `number` and its halo by one warp. Returns a bit per visible region.
template <typename T, int K>
__device__ __forceinline__ uint32_t copy_patch(uint32_t *words, int64_t *first_rows, const T *rows, const Tiles &tiles,
                                               int64_t number, int32_t channels, int32_t first_channel, int32_t lane) {
  using H = Halo<K, 2>;
  int64_t region = -1;
  if (lane < H::kRegions * H::kRegions) {
    region = first_row<2>(tiles, number, lane / H::kRegions - H::kRegionReach, lane % H::kRegions - H::kRegionReach);
  }
  __syncwarp();  // the last patch is done with
  first_rows[lane] = region;
  const uint32_t visible = __ballot_sync(kWholeWarp, region >= 0);
  __syncwarp();
  for (int32_t i = lane; i < H::kArea * kCopiesPerLine; i += kLanes) {
    copy_halo<T, K, 2>(words, rows, first_rows, i, tiles.pixels, channels, first_channel);
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncwarp();
  return visible;
}

// Calls f(tap, output, values) for every visible pixel of the halo and every output that reads it, all known when compiled.
// Taps are numbered (y, x) row-major.
template <typename T, int K, typename F>
__device__ __forceinline__ void for_patch(const uint32_t *words, uint32_t visible, int32_t lane, F f) {
  using H = Halo<K, 2>;
#pragma unroll
  for (int32_t region = 0; region < H::kRegions * H::kRegions; ++region) {
    if (!(visible >> region & 1)) continue;  // the same for the whole warp
#pragma unroll
    for (int32_t pixel = 0; pixel < H::kArea; ++pixel) {
      const int32_t y = pixel / H::kSide, x = pixel % H::kSide;
      if (H::region(y) * H::kRegions + H::region(x) != region) continue;
      float values[Word<T>::kChannels];
      Word<T>::unpack(words[pixel * kLanes + lane], values);
#pragma unroll
      for (int32_t output = 0; output < 4; ++output) {
        const int32_t dy = y - output / 2, dx = x - output % 2;
        if (dy >= 0 && dy < K && dx >= 0 && dx < K) f(dy * K + dx, output, values);
      }
    }
  }
}

template <typename T, int K>
__global__ void __launch_bounds__(threads_of(kPatchWarps))
    conv_patches(T *out, const T *rows, const T *kernel, const T *bias, Tiles tiles, int32_t channels, bool flip) {
  constexpr int32_t N = Word<T>::kChannels;
  SPARKME_SHARED(PatchShared<K>, shared);
  const int32_t lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int32_t first_channel = blockIdx.y * kLineChannels<T>, channel = first_channel + lane * N;

  float weights[K * K][N];
#pragma unroll
  for (int32_t tap = 0; tap < K * K; ++tap) {
    const int32_t place = tap % K * K + tap / K;  // (y, x) row-major here, y + K * x in the kernel
    float values[N] = {};
    if (channel < channels) {
      const T *from = kernel + static_cast<int64_t>(flip ? K * K - 1 - place : place) * channels + channel;
      Word<T>::unpack(*reinterpret_cast<const uint32_t *>(from), values);
    }
#pragma unroll
    for (int32_t n = 0; n < N; ++n) weights[tap][n] = values[n];
  }
  for (int64_t number = static_cast<int64_t>(blockIdx.x) * kPatchWarps + warp; number < tiles.count;
       number += static_cast<int64_t>(gridDim.x) * kPatchWarps) {
    const uint32_t visible =
        copy_patch<T, K>(shared.words[warp], shared.first_rows[warp], rows, tiles, number, channels, first_channel, lane);
    if (channel >= channels) continue;
    float start[N] = {};
    if (bias) Word<T>::unpack(*reinterpret_cast<const uint32_t *>(bias + channel), start);
    float sums[4][N];
#pragma unroll
    for (int32_t i = 0; i < 4 * N; ++i) sums[i / N][i % N] = start[i % N];
    for_patch<T, K>(shared.words[warp], visible, lane, [&](int32_t tap, int32_t output, const float *values) {
#pragma unroll
      for (int32_t n = 0; n < N; ++n) sums[output][n] += values[n] * weights[tap][n];
    });
    const int64_t centre = shared.first_rows[warp][Halo<K, 2>::kCentre];
#pragma unroll
    for (int32_t output = 0; output < 4; ++output) {
      const int64_t row = centre + output / 2 * tiles.pixels + output % 2;
      *reinterpret_cast<uint32_t *>(out + row * channels + channel) = Word<T>::pack(sums[output]);
    }
  }
}

template <int K, int N>
union PatchGradShared {
  PatchShared<K> patch;
  float sums[K * K][kLanes * N];
};

template <typename T, int K>
__global__ void __launch_bounds__(threads_of(kPatchWarps))
    grad_patches(float *partial, const T *rows, const T *grad, Tiles tiles, int32_t channels) {
  constexpr int32_t N = Word<T>::kChannels;
  using S = PatchGradShared<K, N>;
  SPARKME_SHARED(S, shared);
  const int32_t lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int32_t first_channel = blockIdx.y * kLineChannels<T>, channel = first_channel + lane * N;

  float sums[K * K][N] = {};
  for (int64_t number = static_cast<int64_t>(blockIdx.x) * kPatchWarps + warp; number < tiles.count;
       number += static_cast<int64_t>(gridDim.x) * kPatchWarps) {
    const uint32_t visible = copy_patch<T, K>(shared.patch.words[warp], shared.patch.first_rows[warp], rows, tiles, number,
                                              channels, first_channel, lane);
    if (channel >= channels) continue;
    const int64_t centre = shared.patch.first_rows[warp][Halo<K, 2>::kCentre];
    float grads[4][N];
#pragma unroll
    for (int32_t output = 0; output < 4; ++output) {
      const int64_t row = centre + output / 2 * tiles.pixels + output % 2;
      Word<T>::unpack(*reinterpret_cast<const uint32_t *>(grad + row * channels + channel), grads[output]);
    }
    for_patch<T, K>(shared.patch.words[warp], visible, lane, [&](int32_t tap, int32_t output, const float *values) {
#pragma unroll
      for (int32_t n = 0; n < N; ++n) sums[tap][n] += values[n] * grads[output][n];
    });
  }
  // One warp after the other, so that the order of the sum is always the same.
  for (int32_t turn = 0; turn < kPatchWarps; ++turn) {
    __syncthreads();
    if (warp != turn) continue;
#pragma unroll
    for (int32_t tap = 0; tap < K * K; ++tap) {
#pragma unroll
      for (int32_t n = 0; n < N; ++n) {
        float *sum = &shared.sums[tap][lane * N + n];
        *sum = turn == 0 ? sums[tap][n] : *sum + sums[tap][n];
      }
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < K * K * kLanes * N; i += kPatchWarps * kLanes) {
    const int32_t tap = i / (kLanes * N), c = i % (kLanes * N);
    if (first_channel + c >= channels) continue;
    const int32_t place = tap % K * K + tap / K;
    partial[(static_cast<int64_t>(blockIdx.x) * K * K + place) * channels + first_channel + c] = shared.sums[tap][c];
  }
}

// -------------------------------------------------------------------------------------------------------- anything else

constexpr int32_t kThreads = 128;
constexpr int32_t kNeighbours = 1024;  // that a block finds at a time

// The output rows (input rows if `transposed`) of a convolution, and what is on the other side of it.
struct Sides {
  Sites sites;
  Window window;
  int64_t num_rows;
  int32_t pixels, side;
  bool transposed;

  Sides(const Geometry &geometry, bool transposed_)
      : sites(geometry.sites),
        window(geometry.window),
        pixels(geometry.pixels),
        side(transposed_ ? geometry.pixels : geometry.pixels / geometry.window.stride),
        transposed(transposed_) {
    num_rows = geometry.patches * side * side;
  }

  __device__ __forceinline__ int64_t neighbour(int64_t row, int32_t tap) const {
    const int32_t area = side * side, within = static_cast<int32_t>(row % area);
    const int32_t patch = static_cast<int32_t>(row / area), y = within / side, x = within % side;
    return transposed ? output_row(sites, window, patch, y, x, tap, pixels)
                      : input_row(sites, window, patch, y, x, tap, pixels);
  }
};

struct NeighbourShared {
  int64_t rows[kNeighbours];
};

// Threads: x along channels, y along rows.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    conv_rows(T *out, const T *rows, const T *kernel, const T *bias, Sides sides, int32_t channels) {
  SPARKME_SHARED(NeighbourShared, shared);
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x, row_count = blockDim.y;
  const int32_t taps = sides.window.taps(), taps_at_once = kNeighbours / row_count;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * row_count, row = first + threadIdx.y;
  const int32_t channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  const bool exists = row < sides.num_rows && channel < channels;
  Sum<T> sums[V] = {};
  if (bias && exists) {
    const Pack<T, V> start = load_pack<T, V>(bias + channel);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] = static_cast<Sum<T>>(start.values[v]);
  }
  for (int32_t first_tap = 0; first_tap < taps; first_tap += taps_at_once) {
    const int32_t count = taps - first_tap < taps_at_once ? taps - first_tap : taps_at_once;
    for (int32_t i = thread; i < count * row_count; i += kThreads) {
      shared.rows[i] = first + i / count < sides.num_rows ? sides.neighbour(first + i / count, first_tap + i % count) : -1;
    }
    __syncthreads();
    for (int32_t i = 0; exists && i < count; ++i) {
      const int64_t neighbour = shared.rows[threadIdx.y * count + i];
      if (neighbour < 0) continue;
      const Pack<T, V> values = load_pack<T, V>(rows + neighbour * channels + channel);
      const Pack<T, V> weights = load_pack<T, V>(kernel + static_cast<int64_t>(first_tap + i) * channels + channel);
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += static_cast<Sum<T>>(values.values[v]) * static_cast<Sum<T>>(weights.values[v]);
    }
    __syncthreads();
  }
  if (!exists) return;
  Pack<T, V> result;
  for (int v = 0; v < V; ++v) result.values[v] = static_cast<T>(sums[v]);
  store_pack<T, V>(out + row * channels + channel, result);
}

template <typename T, int V>
struct RowGradShared {
  int64_t rows[kNeighbours];
  Sum<T> sums[kThreads][V];
};

// Block (chunk, tap, channels) sums over a chunk of the rows.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    grad_rows(Sum<T> *partial, const T *rows, const T *grad, Sides sides, int64_t chunk, int32_t channels) {
  using S = RowGradShared<T, V>;
  SPARKME_SHARED(S, shared);
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x, tap = blockIdx.y;
  const int32_t channel = (blockIdx.z * blockDim.x + threadIdx.x) * V;
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < sides.num_rows ? begin + chunk : sides.num_rows;
  Sum<T> sums[V] = {};
  for (int64_t first = begin; first < end; first += kNeighbours) {
    const int32_t count = static_cast<int32_t>(end - first < kNeighbours ? end - first : kNeighbours);
    for (int32_t i = thread; i < count; i += kThreads) shared.rows[i] = sides.neighbour(first + i, tap);
    __syncthreads();
    for (int32_t i = threadIdx.y; channel < channels && i < count; i += blockDim.y) {
      if (shared.rows[i] < 0) continue;
      const Pack<T, V> values = load_pack<T, V>(rows + shared.rows[i] * channels + channel);
      const Pack<T, V> grads = load_pack<T, V>(grad + (first + i) * channels + channel);
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += static_cast<Sum<T>>(values.values[v]) * static_cast<Sum<T>>(grads.values[v]);
    }
    __syncthreads();
  }
  for (int v = 0; v < V; ++v) shared.sums[thread][v] = sums[v];
  __syncthreads();
  if (threadIdx.y > 0 || channel >= channels) return;
  for (int32_t y = 1; y < static_cast<int32_t>(blockDim.y); ++y) {
    for (int v = 0; v < V; ++v) sums[v] += shared.sums[y * blockDim.x + threadIdx.x][v];
  }
  Sum<T> *to = partial + (static_cast<int64_t>(blockIdx.x) * gridDim.y + tap) * channels + channel;
  for (int v = 0; v < V; ++v) to[v] = sums[v];
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

template <typename T>
void reduce(T *out, const Sum<T> *partial, int64_t count, int64_t size, Stream stream) {
  SPARKME_LAUNCH(sum_partials<T>, dim3(ceil_div(size, kReduceLanes)), dim3(kReduceLanes, kReduceParts), stream, out, partial,
                 static_cast<int32_t>(count), size);
}

// --------------------------------------------------------------------------------------------------- which way, and grids

// The tile to cut patches into, or 0 where only the general kernels can do it. `K` is 0 for a window that has no kernel of
// its own.
struct Way {
  int32_t kernel = 0, tile = 0;

  template <typename T, typename... Pointers>
  static Way choose(const Geometry &geometry, int32_t channels, const T *first, Pointers... rest) {
    Way way;
    const Window &window = geometry.window;
    if (std::is_same_v<T, double> || window.height != window.width || window.stride != 1 || window.dilation != 1) return way;
    if (window.height != 3 && window.height != 5 && window.height != 7) return way;
    if (!fits_widest<T>(channels, first, rest...)) return way;
    way.kernel = window.height;
    way.tile = geometry.pixels % 8 == 0 ? 8 : geometry.pixels % 4 == 0 ? 4 : geometry.pixels % 2 == 0 ? 2 : 0;
    return way;
  }
};

Tiles tiles_of(const Geometry &geometry, int32_t tile) {
  const int32_t per_side = geometry.pixels / tile;
  return {geometry.sites, geometry.patches * per_side * per_side, per_side, geometry.pixels};
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
int64_t blocks_for(int64_t work, int64_t lines, const Geometry &geometry, int32_t per_multiprocessor, int32_t waves) {
  const int64_t resident = static_cast<int64_t>(geometry.multiprocessors) * per_multiprocessor * waves;
  return std::max<int64_t>(1, std::min(work, ceil_div(resident, lines)));
}

template <typename T, int TILE>
void launch_conv(T *out, const T *rows, const T *kernel, const T *bias, const Geometry &geometry, int32_t size,
                 int32_t channels, bool flip, Stream stream) {
  const Tiles tiles = tiles_of(geometry, TILE);
  const int64_t lines = ceil_div(channels, kLineChannels<T>);
  with_kernel(size, [&](auto constant) {
    constexpr int K = decltype(constant)::value;
    if constexpr (TILE == 2) {
      static const int32_t at_a_time = blocks_at_a_time(&conv_patches<T, K>, threads_of(kPatchWarps));
      const dim3 grid(blocks_for(ceil_div(tiles.count, kPatchWarps), lines, geometry, at_a_time, 2), lines);
      SPARKME_LAUNCH((conv_patches<T, K>), grid, dim3(kPatchWarps * kLanes), stream, out, rows, kernel, bias, tiles, channels,
                     flip);
    } else {
      static const int32_t at_a_time = blocks_at_a_time(&conv_tiles<T, K, TILE>, threads_of(kTileWarps));
      const dim3 grid(blocks_for(ceil_div(tiles.count, kTilesAtOnce<TILE>), lines, geometry, at_a_time, 2), lines);
      SPARKME_LAUNCH((conv_tiles<T, K, TILE>), grid, dim3(kTileWarps * kLanes), stream, out, rows, kernel, bias, tiles,
                     channels, flip);
    }
  });
}

template <typename T, int TILE>
void launch_grad(T *out, const T *rows, const T *grad, const Geometry &geometry, int32_t size, int32_t channels,
                 const Allocate &allocate, Stream stream) {
  const Tiles tiles = tiles_of(geometry, TILE);
  const int64_t lines = ceil_div(channels, kLineChannels<T>), taps = geometry.window.taps();
  const int64_t work = ceil_div(tiles.count, TILE == 2 ? kPatchWarps : 8 / TILE);
  with_kernel(size, [&](auto constant) {
    constexpr int K = decltype(constant)::value;
    auto *const kernel = [] {
      if constexpr (TILE == 2) {
        return &grad_patches<T, K>;
      } else {
        return &grad_tiles<T, K, TILE>;
      }
    }();
    constexpr int32_t kBlock = threads_of(TILE == 2 ? kPatchWarps : K);
    static const int32_t at_a_time = blocks_at_a_time(kernel, kBlock);
    const int64_t blocks = blocks_for(work, lines, geometry, at_a_time, 1);
    auto *const partial = static_cast<float *>(allocate(blocks * taps * channels * sizeof(float)));
    SPARKME_LAUNCH(*kernel, dim3(blocks, lines), dim3(kBlock), stream, partial, rows, grad, tiles, channels);
    reduce(out, partial, blocks, taps * channels, stream);
  });
}

template <typename T, int V>
void launch_conv_rows(T *out, const T *rows, const T *kernel, const T *bias, const Geometry &geometry, int32_t channels,
                      bool transposed, Stream stream) {
  const Sides sides(geometry, transposed);
  const int64_t vectors = ceil_div(channels, V);
  const dim3 block = row_block(vectors, kThreads), grid(ceil_div(sides.num_rows, block.y), ceil_div(vectors, block.x));
  SPARKME_LAUNCH((conv_rows<T, V>), grid, block, stream, out, rows, kernel, bias, sides, channels);
}

template <typename T, int V>
void launch_grad_rows(T *out, const T *rows, const T *grad, const Geometry &geometry, int32_t channels,
                      const Allocate &allocate, Stream stream) {
  const Sides sides(geometry, false);
  const int64_t vectors = ceil_div(channels, V), taps = geometry.window.taps();
  const dim3 block = row_block(vectors, kThreads);
  const int64_t lines = ceil_div(vectors, block.x);
  static const int32_t at_a_time = blocks_at_a_time(&grad_rows<T, V>, kThreads);
  const int64_t blocks = blocks_for(ceil_div(sides.num_rows, 64), lines * taps, geometry, at_a_time, 2);
  auto *const partial = static_cast<Sum<T> *>(allocate(blocks * taps * channels * sizeof(Sum<T>)));
  SPARKME_LAUNCH((grad_rows<T, V>), dim3(blocks, taps, lines), block, stream, partial, rows, grad, sides,
                 ceil_div(sides.num_rows, blocks), channels);
  reduce(out, partial, blocks, taps * channels, stream);
}

}  // namespace

template <typename T>
void depthwise_conv(T *out, const T *rows, const T *kernel, const T *bias, const Geometry &geometry, int32_t channels,
                    bool transposed, Stream stream) {
  if (geometry.patches == 0 || channels == 0) return;
  if constexpr (!std::is_same_v<T, double>) {
    const Way way = Way::choose(geometry, channels, rows, kernel, bias, out);
    // With stride 1 an output and an input are each other's neighbours through opposite taps.
    if (way.tile == 8) return launch_conv<T, 8>(out, rows, kernel, bias, geometry, way.kernel, channels, transposed, stream);
    if (way.tile == 4) return launch_conv<T, 4>(out, rows, kernel, bias, geometry, way.kernel, channels, transposed, stream);
    if (way.tile == 2) return launch_conv<T, 2>(out, rows, kernel, bias, geometry, way.kernel, channels, transposed, stream);
  }
  if (fits_widest<T>(channels, rows, kernel, bias, out)) {
    launch_conv_rows<T, kWidest<T>>(out, rows, kernel, bias, geometry, channels, transposed, stream);
  } else {
    launch_conv_rows<T, 1>(out, rows, kernel, bias, geometry, channels, transposed, stream);
  }
}

template <typename T>
void depthwise_conv_grad_kernel(T *out, const T *rows, const T *grad, const Geometry &geometry, int32_t channels,
                                const Allocate &allocate, Stream stream) {
  if (channels == 0) return;
  if constexpr (!std::is_same_v<T, double>) {
    const Way way = Way::choose(geometry, channels, rows, grad);
    if (way.tile == 8) return launch_grad<T, 8>(out, rows, grad, geometry, way.kernel, channels, allocate, stream);
    if (way.tile == 4) return launch_grad<T, 4>(out, rows, grad, geometry, way.kernel, channels, allocate, stream);
    if (way.tile == 2) return launch_grad<T, 2>(out, rows, grad, geometry, way.kernel, channels, allocate, stream);
  }
  if (fits_widest<T>(channels, rows, grad)) {
    launch_grad_rows<T, kWidest<T>>(out, rows, grad, geometry, channels, allocate, stream);
  } else {
    launch_grad_rows<T, 1>(out, rows, grad, geometry, channels, allocate, stream);
  }
}

#define SPARKME_INSTANTIATE(T)                                                                                    \
  template void depthwise_conv<T>(T *, const T *, const T *, const T *, const Geometry &, int32_t, bool, Stream); \
  template void depthwise_conv_grad_kernel<T>(T *, const T *, const T *, const Geometry &, int32_t, const Allocate &, Stream);
SPARKME_INSTANTIATE(double)
SPARKME_INSTANTIATE(float)
SPARKME_INSTANTIATE(c10::BFloat16)
#undef SPARKME_INSTANTIATE

}  // namespace sparkme::cuda
