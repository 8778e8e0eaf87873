// Depthwise convolution of patches of 2 pixels, patch by patch. See depthwise.cu.
#include "depthwise.h"

namespace sparkme::cuda {
namespace {

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

}  // namespace

template <typename T>
void convolve_patches(const Depthwise<T> &call) {
  const Tiles tiles = tiles_of(call.geometry, 2);
  const int64_t lines = ceil_div(call.channels, kLineChannels<T>);
  with_kernel(call.geometry.window.height, [&](auto constant) {
    constexpr int K = decltype(constant)::value;
    static const int32_t at_a_time = blocks_at_a_time(&conv_patches<T, K>, threads_of(kPatchWarps));
    const dim3 grid(blocks_for(ceil_div(tiles.count, kPatchWarps), lines, call.geometry, at_a_time, 2), lines);
    // With stride 1 an output and an input are each other's neighbours through opposite taps.
    SPARKME_LAUNCH((conv_patches<T, K>), grid, dim3(threads_of(kPatchWarps)), call.stream, call.out, call.rows, call.kernel,
                   call.bias, tiles, call.channels, call.transposed);
  });
}

template <typename T>
void correlate_patches(const DepthwiseGradKernel<T> &call) {
  const Tiles tiles = tiles_of(call.geometry, 2);
  const int64_t lines = ceil_div(call.channels, kLineChannels<T>);
  with_kernel(call.geometry.window.height, [&](auto constant) {
    constexpr int K = decltype(constant)::value;
    static const int32_t at_a_time = blocks_at_a_time(&grad_patches<T, K>, threads_of(kPatchWarps));
    const int64_t blocks = blocks_for(ceil_div(tiles.count, kPatchWarps), lines, call.geometry, at_a_time, 1);
    float *const partial = allocate_partial(call, blocks);
    SPARKME_LAUNCH((grad_patches<T, K>), dim3(blocks, lines), dim3(threads_of(kPatchWarps)), call.stream, partial, call.rows,
                   call.grad, tiles, call.channels);
    reduce(call, partial, blocks);
  });
}

template void convolve_patches(const Depthwise<float> &);
template void convolve_patches(const Depthwise<c10::BFloat16> &);
template void correlate_patches(const DepthwiseGradKernel<float> &);
template void correlate_patches(const DepthwiseGradKernel<c10::BFloat16> &);

}  // namespace sparkme::cuda
