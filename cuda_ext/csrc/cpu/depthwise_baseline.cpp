#include <cstdint>
#include <type_traits>
#include <vector>

#include "depthwise_kernels.h"

#define SPARKME_VECTOR_BYTES 16
#define SPARKME_TABLE kDepthwiseBaseline
#include "depthwise_kernels.inl"
