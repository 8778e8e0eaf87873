// CUDA's words on the host, for the sources in cuda_ext/csrc/cuda: blocks run one after the other, the threads of a block as
// fibers that change places at barriers. What this can show is what a kernel computes, that it stays within its arrays and that
// its barriers suffice in the two orders of threads tried; what it cannot show is that nvcc and a GPU agree.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(int64_t x_, int64_t y_ = 1, int64_t z_ = 1)
      : x(static_cast<unsigned>(x_)), y(static_cast<unsigned>(y_)), z(static_cast<unsigned>(z_)) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace on_host {

struct Stream {};
constexpr int32_t kMultiprocessors = 3;  // few, so that blocks do several pieces of work
constexpr int32_t kBlocksAtATime = 2;  // of a multiprocessor
constexpr int64_t kStackBytes = 256 << 10;
constexpr unsigned kWarp = 32;

struct DeviceGuard {
  template <typename Device>
  explicit DeviceGuard(const Device &) {}
  ~DeviceGuard() {}
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  int64_t barriers = 0, warp_barriers = 0;  // reached so far
};

// The block that runs.
struct Block {
  std::vector<Fiber> fibers;
  std::function<void()> body;
  std::vector<char> shared;
  ucontext_t scheduler;
  unsigned current = 0;
  uint32_t ballots[32] = {};
};

inline Block block;

inline void yield() { swapcontext(&block.fibers[block.current].context, &block.scheduler); }

// Waits until the threads [begin, end) of the block have been here as often as this one.
template <typename Count>
void wait(unsigned begin, unsigned end, Count count) {
  const int64_t mine = ++count(block.fibers[block.current]);
  for (;;) {
    bool all = true;
    for (unsigned i = begin; i < end && i < block.fibers.size(); ++i) all = all && count(block.fibers[i]) >= mine;
    if (all) return;
    yield();
  }
}

inline void run_fiber() {
  block.body();
  block.fibers[block.current].done = true;
  yield();
}

template <typename T>
T &shared() {
  static_assert(std::is_trivial_v<T> || std::is_union_v<T>);
  // One byte too few or too many is seen by the address sanitizer. Garbage, NaN for floats, is in memory nobody has written.
  if (block.shared.size() != sizeof(T)) {
    block.shared = std::vector<char>(sizeof(T));
    std::memset(block.shared.data(), 0xff, sizeof(T));
  }
  return *reinterpret_cast<T *>(block.shared.data());
}

inline void run_block(const std::function<void()> &body) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  if (threads == 0 || threads > 1024) throw std::runtime_error("a block must have 1 to 1024 threads");
  if (block.fibers.size() != threads) block.fibers = std::vector<Fiber>(threads);
  block.body = body;
  block.shared.clear();
  for (Fiber &fiber : block.fibers) {
    fiber.done = false;
    fiber.barriers = fiber.warp_barriers = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  const bool backwards = std::getenv("SPARKME_THREADS_BACKWARDS") != nullptr;
  for (unsigned left = threads, idle = 0; left > 0;) {
    const unsigned before = left;
    int64_t reached = 0;
    for (const Fiber &fiber : block.fibers) reached += fiber.barriers + fiber.warp_barriers;
    for (unsigned i = 0; i < threads; ++i) {
      block.current = backwards ? threads - 1 - i : i;
      Fiber &fiber = block.fibers[block.current];
      if (fiber.done) continue;
      threadIdx.x = block.current % blockDim.x;
      threadIdx.y = block.current / blockDim.x % blockDim.y;
      threadIdx.z = block.current / blockDim.x / blockDim.y;
      swapcontext(&block.scheduler, &fiber.context);
      left -= fiber.done;
    }
    for (const Fiber &fiber : block.fibers) reached -= fiber.barriers + fiber.warp_barriers;
    idle = reached == 0 && left == before ? idle + 1 : 0;
    if (idle > 1) throw std::runtime_error("threads wait at a barrier that others have left or never reach");
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 threads, const Arguments &...arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("the grid is empty or too large");
  }
  gridDim = grid;
  blockDim = threads;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block([&] { kernel(arguments...); });
    }
  }
}

// Pieces of shared memory that were asked for and did not arrive before they were waited for would show as garbage.
struct Copy {
  void *to;
  const void *from;
  size_t bytes;
};

}  // namespace on_host

inline void __syncthreads() {
  on_host::wait(0, blockDim.x * blockDim.y * blockDim.z, [](on_host::Fiber &fiber) -> int64_t & { return fiber.barriers; });
}

inline void __syncwarp() {
  const unsigned first = on_host::block.current / on_host::kWarp * on_host::kWarp;
  on_host::wait(first, first + on_host::kWarp, [](on_host::Fiber &fiber) -> int64_t & { return fiber.warp_barriers; });
}

inline uint32_t __ballot_sync(uint32_t, bool value) {
  const unsigned warp = on_host::block.current / on_host::kWarp, bit = 1u << on_host::block.current % on_host::kWarp;
  uint32_t &ballot = on_host::block.ballots[warp];
  ballot = value ? ballot | bit : ballot & ~bit;
  __syncwarp();
  const uint32_t result = ballot;
  __syncwarp();
  return result;
}

// Copies happen at the wait, as late as they may on a GPU.
inline std::vector<std::vector<on_host::Copy>> &pending_copies() {
  static std::vector<std::vector<on_host::Copy>> copies(1024);
  return copies;
}

inline void __pipeline_memcpy_async(void *to, const void *from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) std::abort();
  pending_copies()[on_host::block.current].push_back({to, from, bytes});
}

inline void __pipeline_commit() {}

inline void __pipeline_wait_prior(size_t) {
  auto &copies = pending_copies()[on_host::block.current];
  for (const on_host::Copy &copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
  copies.clear();
}

#define SPARKME_LAUNCH(kernel, grid, block, stream, ...) \
  do {                                                   \
    auto *const launched = &kernel;                      \
    (void)stream;                                        \
    on_host::launch(launched, grid, block, __VA_ARGS__); \
  } while (0)

#define SPARKME_SHARED(type, name) type &name = on_host::shared<type>()

#define SPARKME_LIBRARY sparkme_on_host
#define SPARKME_KEY CPU
