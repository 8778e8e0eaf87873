#include "kernels.h"

#include <cstdlib>
#include <string_view>

namespace sparkme {
namespace {

// The best one for this processor, or less where torch's own variable says so: default, avx2 or avx512.
const KernelTable &choose() {
#if defined(__x86_64__) && defined(__GNUC__)
  const char *variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = variable == nullptr ? "" : variable;
  if (most == "default") return kKernelsBaseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512cd");
  if (avx512 && most != "avx2") {
    // With AMX oneDNN is far ahead of products of pairs.
    const bool pairs = __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_supports("amx-bf16") && most != "avx512";
    return pairs ? kKernelsAvx512Bf16 : kKernelsAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return kKernelsAvx2;
#endif
  return kKernelsBaseline;
}

}  // namespace

const KernelTable &kernel_table() {
  static const KernelTable &table = choose();
  return table;
}

}  // namespace sparkme
