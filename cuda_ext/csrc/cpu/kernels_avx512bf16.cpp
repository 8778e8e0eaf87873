#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")

#define SPARKME_VECTOR_BYTES 64
#define SPARKME_BF16_PAIRS
#define SPARKME_TABLE kKernelsAvx512Bf16
#include "kernels.inl"

#pragma GCC pop_options
#endif
