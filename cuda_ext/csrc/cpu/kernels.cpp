#include "kernels.h"

namespace sparkme {

const KernelTable &kernel_table() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
    // With AMX oneDNN is far ahead of products of pairs.
    return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_supports("amx-bf16") ? kKernelsAvx512Bf16 : kKernelsAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return kKernelsAvx2;
#endif
  return kKernelsBaseline;
}

}  // namespace sparkme
