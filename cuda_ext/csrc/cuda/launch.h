// What every CUDA kernel here needs: launches, shared memory, vectors of channels.
//
// The kernels use CUDA's words only as far as the tests can give them a meaning on the host: there the very same sources
// are compiled by the host's compiler against an emulation of blocks and threads (tests/support/cuda_on_host, SPARKME_ON_HOST).
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "../geometry.h"

#if defined(SPARKME_ON_HOST)
#include "on_host.h"
#else
#include <c10/cuda/CUDAException.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#define SPARKME_LAUNCH(kernel, grid, block, stream, ...) \
  do {                                                   \
    auto *const launched = &kernel;                      \
    launched<<<grid, block, 0, stream>>>(__VA_ARGS__);   \
    C10_CUDA_KERNEL_LAUNCH_CHECK();                      \
  } while (0)

// The shared memory of a kernel: one struct without constructors.
#define SPARKME_SHARED(type, name) __shared__ type name
#endif

namespace sparkme::cuda {

#if defined(SPARKME_ON_HOST)
using Stream = on_host::Stream;
#else
using Stream = cudaStream_t;
#endif

// Blocks of a kernel that a multiprocessor holds at a time: it depends on registers and shared memory, which the compiler
// decides on. Asked once; the GPUs of a machine are alike.
template <typename Kernel>
int32_t blocks_at_a_time(Kernel *kernel, int32_t threads) {
#if defined(SPARKME_ON_HOST)
  (void)kernel, (void)threads;
  return on_host::kBlocksAtATime;
#else
  int blocks = 0;
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
  return std::max(1, blocks);
#endif
}

// A convolution over the rows of visible patches.
struct Geometry {
  Sites sites;
  Window window;
  int64_t patches;          // visible ones
  int32_t pixels;           // along a patch of the convolution's input
  int32_t multiprocessors;  // of the device, which the size of some grids follows
};

// What sums are kept in.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Neighbouring channels that one instruction loads or stores.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T *from) {
  return *reinterpret_cast<const Pack<T, N> *>(from);
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(T *to, const Pack<T, N> &pack) {
  *reinterpret_cast<Pack<T, N> *>(to) = pack;
}

// Channels in the widest access that a thread can make.
template <typename T>
constexpr int kWidest = 16 / sizeof(T);

// Whether rows of `channels` at these addresses can be read and written by the widest accesses.
template <typename T, typename... Pointers>
bool fits_widest(int64_t channels, Pointers... pointers) {
  return channels % kWidest<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int32_t kThreads = 256;  // of most blocks

// Threads along channels (x) for `vectors` accesses per row, the others along rows (y).
inline dim3 row_block(int64_t vectors, int32_t threads) {
  int32_t x = 1;
  while (x < vectors && x < threads) x *= 2;
  return dim3(x, threads / x);
}

// A word of neighbouring channels, as one lane of a warp holds it: two of bfloat16, one of float.
template <typename T>
struct Word;

__device__ __forceinline__ float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <>
struct Word<float> {
  static constexpr int kChannels = 1;
  __device__ __forceinline__ static void unpack(uint32_t word, float *values) { values[0] = float_of_bits(word); }
  __device__ __forceinline__ static uint32_t pack(const float *values) {
    uint32_t word;
    memcpy(&word, values, sizeof word);
    return word;
  }
};

template <>
struct Word<c10::BFloat16> {
  static constexpr int kChannels = 2;
  __device__ __forceinline__ static void unpack(uint32_t word, float *values) {
    values[0] = float_of_bits(word << 16);
    values[1] = float_of_bits(word & 0xffff0000u);
  }
  __device__ __forceinline__ static uint32_t pack(const float *values) {
    const c10::BFloat16 low = values[0], high = values[1];
    return static_cast<uint32_t>(low.x) | static_cast<uint32_t>(high.x) << 16;
  }
};

}  // namespace sparkme::cuda
