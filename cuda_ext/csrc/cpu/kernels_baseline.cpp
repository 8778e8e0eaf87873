#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

#define SPARKME_VECTOR_BYTES 16
#define SPARKME_TABLE kKernelsBaseline
#include "kernels.inl"
