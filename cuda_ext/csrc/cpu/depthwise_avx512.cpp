#include <cstdint>
#include <type_traits>
#include <vector>

#include "depthwise_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")

#define SPARKME_VECTOR_BYTES 64
#define SPARKME_TABLE kDepthwiseAvx512
#include "depthwise_kernels.inl"

#pragma GCC pop_options
#endif
