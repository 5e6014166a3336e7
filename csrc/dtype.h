// The element types that cross the border, as the Python side numbers them, and their exact scalar conversions.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTMERGE_INLINE __host__ __device__ inline
#else
#define FASTMERGE_INLINE inline
#endif

namespace fastmerge {

enum class DType : uint8_t { F32 = 0, F16 = 1, BF16 = 2, U8 = 3 };

namespace {  // internal linkage: each instruction set compiles its own copy with its own flags

constexpr uint32_t INFINITE = 0x7f800000;  // as float32 bits; the magnitudes above are NaN

FASTMERGE_INLINE int64_t size_of(DType dtype) {
  return dtype == DType::F32 ? 4 : dtype == DType::U8 ? 1 : 2;
}

FASTMERGE_INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTMERGE_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTMERGE_INLINE float from_bf16(uint16_t half) {
  return from_bits(static_cast<uint32_t>(half) << 16);
}

// Round to nearest even. The one NaN that a sweep writes (0x7fc00000) comes through as 0x7fc0.
FASTMERGE_INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

FASTMERGE_INLINE float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude << 13));  // Inf, NaN
  if (magnitude >= 0x0400) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-24f));  // zero, denormal: exact
}

// Round to nearest even; 65520 and above become Inf.
FASTMERGE_INLINE uint16_t to_f16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude >= 0x38800000) {  // normal: drop 13 bits
    const uint32_t rounded = magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1);
    return static_cast<uint16_t>(sign | (rounded >> 13));
  }
  // Denormal: adding 0.5 leaves multiples of 2^-24 in the low bits of the mantissa, rounded by the addition itself.
  return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000));
}

}  // namespace
}  // namespace fastmerge
