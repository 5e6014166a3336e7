// The lanes of stages.h for one thread of a GPU, and the narrowing of eight elements.
//
// Where the card has an instruction for it, it is used: its bits are those of dtype.h, but for a NaN's (0x7fff in 16
// bits), which a sweep rewrites anyway.
#pragma once
#include <cmath>

#include "../random.h"
#include "../stages.h"
#include "device.h"

namespace fastmerge {
namespace {

struct Lanes {
  using F = float;
  using M = bool;

  static __device__ __forceinline__ F zero() { return 0.0f; }
  static __device__ __forceinline__ F set(float value) { return value; }
  static __device__ __forceinline__ M ge(F a, F b) { return a >= b; }
  static __device__ __forceinline__ M eq(F a, F b) { return a == b; }
  static __device__ __forceinline__ M not_ge(F a, F b) { return !(a >= b); }
  static __device__ __forceinline__ M not_le(F a, F b) { return !(a <= b); }
  static __device__ __forceinline__ M either(M a, M b) { return a || b; }
  static __device__ __forceinline__ F pick(M mask, F yes, F no) { return mask ? yes : no; }
  static __device__ __forceinline__ F where(M mask, F yes) { return mask ? yes : 0.0f; }
  // No sum is ever -0, so that adding nothing and adding zero are the same.
  static __device__ __forceinline__ F add_where(F sum, M mask, F term) { return mask ? sum + term : sum; }
#ifdef __CUDACC__
  static __device__ __forceinline__ F positive_part(F value) {
    asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(value));
    return value;
  }
  static __device__ __forceinline__ F negative_part(F value) {
    asm("min.NaN.f32 %0, %0, 0f00000000;" : "+f"(value));
    return value;
  }
  // The larger magnitude of the two; a NaN is larger than any.
  static __device__ __forceinline__ F larger(F magnitude, F value) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(magnitude) : "f"(fabsf(value)));
    return magnitude;
  }
#else
  static F positive_part(F value) { return value <= 0.0f ? 0.0f : value; }
  static F negative_part(F value) { return value >= 0.0f ? 0.0f : value; }
  static F larger(F magnitude, F value) {
    const uint32_t a = to_bits(magnitude), b = to_bits(value) & 0x7fffffff;
    return from_bits(a > b ? a : b);
  }
#endif
};

// --- division ---

// What the compiler makes of a division leaves its short path, for a slow one, where the dividend is zero, as most sums
// of what is trimmed or dropped are. So none is asked of it.
__device__ __forceinline__ float divided(float dividend, float divisor) {
  const bool none = dividend == 0.0f && divisor == divisor;
  const float quotient = (none ? 1.0f : dividend) / divisor;
  return none ? dividend * copysignf(1.0f, divisor) : quotient;
}

// The compiler's own steps on the short path: the bits are IEEE's for divisors of 2^-20 ... 2^20 and dividends that are
// zero, or of at least 2^-60 in magnitude while the quotient is finite.

// A sum of weights that agree begins with this: it vanishes in the first of them, and a zero can be divided by it.
constexpr float NOBODY = 0x1p-100f;

// a * b + c, rounded once.
__device__ __forceinline__ float fused(float a, float b, float c) {
#ifdef __CUDACC__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

__device__ __forceinline__ float reciprocal(float divisor) {
  float rough;
#ifdef __CUDACC__
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(rough) : "f"(divisor));
#else
  rough = emulated_reciprocal(divisor);
#endif
  return fused(rough, fused(-divisor, rough, 1.0f), rough);
}

// A zero keeps its sign.
__device__ __forceinline__ float quotient(float dividend, float divisor, float inverse) {
  const float near = dividend * inverse;
  return fused(-inverse, fused(divisor, near, -dividend), near);
}

// Two elements of a 16-bit dtype in one word, rounded to nearest even.
__device__ __forceinline__ uint32_t narrow2(float low, float high, DType dtype) {
#ifdef __CUDACC__
  uint32_t word;
  if (dtype == DType::F16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  const auto narrow1 = [dtype](float value) -> uint32_t {
    return value != value ? 0x7fff : dtype == DType::F16 ? to_f16(value) : to_bf16(value);
  };
  return narrow1(low) | narrow1(high) << 16;
#endif
}

__device__ __forceinline__ Raw8 narrow8(const float (&from)[EIGHT], DType dtype) {
  Raw8 raw = {};
  if (dtype == DType::F32) {
    raw.word[0] = make_uint4(to_bits(from[0]), to_bits(from[1]), to_bits(from[2]), to_bits(from[3]));
    raw.word[1] = make_uint4(to_bits(from[4]), to_bits(from[5]), to_bits(from[6]), to_bits(from[7]));
  } else {
    raw.word[0] = make_uint4(narrow2(from[0], from[1], dtype), narrow2(from[2], from[3], dtype),
                             narrow2(from[4], from[5], dtype), narrow2(from[6], from[7], dtype));
  }
  return raw;
}

__device__ __forceinline__ uint32_t quiet2(uint32_t word, uint32_t infinite, uint32_t quiet) {
  const uint32_t low = (word & 0x7fff) > infinite ? quiet : word & 0xffff;
  const uint32_t high = ((word >> 16) & 0x7fff) > infinite ? quiet : word >> 16;
  return low | high << 16;
}

__device__ __forceinline__ uint32_t quiet1(uint32_t word) {
  return (word & 0x7fffffff) > INFINITE ? 0x7fc00000 : word;
}

// Every NaN becomes the one that a sweep writes.
__device__ __forceinline__ Raw8 quiet8(const Raw8& raw, DType dtype) {
  const uint4 a = raw.word[0], b = raw.word[1];
  if (dtype == DType::F32) {
    return {{make_uint4(quiet1(a.x), quiet1(a.y), quiet1(a.z), quiet1(a.w)),
             make_uint4(quiet1(b.x), quiet1(b.y), quiet1(b.z), quiet1(b.w))}};
  }
  const uint32_t infinite = dtype == DType::F16 ? 0x7c00 : 0x7f80, quiet = dtype == DType::F16 ? 0x7e00 : 0x7fc0;
  return {{make_uint4(quiet2(a.x, infinite, quiet), quiet2(a.y, infinite, quiet), quiet2(a.z, infinite, quiet),
                      quiet2(a.w, infinite, quiet)),
           b}};
}

}  // namespace
}  // namespace fastmerge
