// The instruction sets of this build, best first, and whether this processor has them.
#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "kernels.h"

namespace fastmerge {

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
const Kernels* const KERNELS[] = {&kernels_avx512, &kernels_avx2, &kernels_scalar};
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
const Kernels* const KERNELS[] = {&kernels_neon, &kernels_scalar};
#else
const Kernels* const KERNELS[] = {&kernels_scalar};
#endif
const int KERNELS_COUNT = sizeof KERNELS / sizeof *KERNELS;

#if defined(__x86_64__)
// Clang's __builtin_cpu_supports learnt "f16c" late.
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

const char* why_not(const Kernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&kernels == &kernels_avx512) {
    const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("bmi2");
    return has ? nullptr : "this processor has no AVX-512 F, BW, DQ and VL, or no BMI2";
  }
  if (&kernels == &kernels_avx2) {
    const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    return has ? nullptr : "this processor has no AVX2, FMA and F16C";
  }
#endif
  static_cast<void>(kernels);
  return nullptr;
}

}  // namespace fastmerge
