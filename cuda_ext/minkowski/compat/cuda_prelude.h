// Included before every file that nvcc compiles: what MinkowskiEngine's sources of 2021 expect from CUDA, Thrust and
// PyTorch and today's no longer give without asking. Every part is guarded, so that older toolkits are not disturbed.
#ifndef SPARKME_MINKOWSKI_CUDA_PRELUDE_H
#define SPARKME_MINKOWSKI_CUDA_PRELUDE_H

#ifdef __cplusplus

// spmm.cu reaches the definition of its functions on tensors before that of at::Tensor.
#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

// Other Thrust headers used to bring these along.
#include <thrust/device_vector.h>
#include <thrust/execution_policy.h>
#include <thrust/for_each.h>
#include <thrust/functional.h>
#include <thrust/iterator/zip_iterator.h>
#include <thrust/remove.h>
#include <thrust/scan.h>
#include <thrust/sequence.h>
#include <thrust/sort.h>
#include <thrust/transform.h>
#include <thrust/tuple.h>
#include <thrust/unique.h>
#include <thrust/version.h>

#if THRUST_MAJOR_VERSION >= 3
namespace thrust {
// Only its member types were ever used. Thrust 3 removed it, as C++17 removed the one in std.
template <typename Argument, typename Result>
struct unary_function {
  using argument_type = Argument;
  using result_type = Result;
};
}  // namespace thrust
#endif

#if CUDART_VERSION >= 13000
// CUDA 13 replaced the device number by a location and added flags. This overload keeps the old form of the call.
inline cudaError_t cudaMemPrefetchAsync(const void *pointer, size_t bytes, int device, cudaStream_t stream) {
  cudaMemLocation location{};
  location.type = device == cudaCpuDeviceId ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
  location.id = device == cudaCpuDeviceId ? 0 : device;
  return cudaMemPrefetchAsync(pointer, bytes, location, 0, stream);
}
#endif

#endif  // __cplusplus
#endif  // SPARKME_MINKOWSKI_CUDA_PRELUDE_H
