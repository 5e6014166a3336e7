// Lanes: the vector operations that kernels.inl and stages.h are written in, once per instruction set.
//
// Each `isa_*.cpp` includes exactly one of these. F holds `width` floats, U as many 32-bit words, M a mask; D holds
// float64 lanes, two of which cover an F; P holds 64-bit lanes, of which `product` multiplies the lower halves. Loads
// and stores may be misaligned. A NaN is its own positive and negative part, and is not clipped; zeros keep their sign.
// `draws` are the 16-bit random pieces of random.h, in the order of the elements.
//
// A line is the elements of one full vector load, `vectors<dtype>` F of floats. Those of BF16 are not in the order of
// the elements, as the even ones are one shift away from float32 and the odd ones one mask: lane `lane` of F number
// `vector` is element `element<dtype>(vector, lane)` of its line, and `in_order` sorts a line.
#pragma once
#include <cstdint>
#include <cstring>

#include "../random.h"
#include "../stages.h"

#if defined(FASTMERGE_LANES_AVX512) || defined(FASTMERGE_LANES_AVX2)
#include <immintrin.h>
#elif defined(FASTMERGE_LANES_NEON)
#include <arm_neon.h>
#endif

namespace fastmerge {
namespace {

#if defined(FASTMERGE_LANES_AVX512)

struct Lanes {
  using F = __m512;
  struct U {
    __m512i v;
  };
  using M = __mmask16;
  struct P {
    __m512i v;
  };
  using D = __m512d;
  static constexpr int width = 16;
  static constexpr int draws_at_once = 64;
  static constexpr const char* name = "avx512";

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float value) { return _mm512_set1_ps(value); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  template <DType dtype>
  static F read(const char* from) {
    if constexpr (dtype == DType::F32) return _mm512_loadu_ps(from);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (dtype == DType::F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  template <DType dtype>
  static void write(char* to, F value) {
    if constexpr (dtype == DType::F32) return _mm512_storeu_ps(to, value);
    __m256i half;
    if constexpr (dtype == DType::F16) {
      half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    } else {
      half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(value), 16));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  }

  template <DType dtype>
  static constexpr int vectors = dtype == DType::F32 ? 1 : 2;
  template <DType dtype>
  static constexpr int element(int vector, int lane) {
    return dtype == DType::BF16 ? 2 * lane + vector : vector * width + lane;
  }
  template <DType dtype>
  static void read_line(const char* from, F* line) {
    if constexpr (dtype == DType::BF16) {
      const __m512i halves = _mm512_loadu_si512(from);
      line[0] = _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
      line[1] = _mm512_castsi512_ps(_mm512_and_si512(halves, upper_halves()));
    } else {
      line[0] = read<dtype>(from);
      if constexpr (dtype == DType::F16) line[1] = read<dtype>(from + 32);
    }
  }
  // Past the caches where `past` is true: then `to` is a multiple of 64.
  template <DType dtype>
  static void write_line(char* to, const F* line, bool past) {
    __m512i bits;
    if constexpr (dtype == DType::F32) {
      bits = _mm512_castps_si512(line[0]);
    } else if constexpr (dtype == DType::F16) {
      bits = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(line[0], _MM_FROUND_TO_NEAREST_INT)),
                                _mm512_cvtps_ph(line[1], _MM_FROUND_TO_NEAREST_INT), 1);
    } else {  // even | (odd & upper_halves)
      bits = _mm512_ternarylogic_epi32(_mm512_srli_epi32(rounded(line[0]), 16), rounded(line[1]), upper_halves(), 0xf8);
    }
    if (past) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits);
    _mm512_storeu_si512(to, bits);
  }
  template <DType dtype>
  static void copy_line(const char* from, char* to, bool past) {
    const __m512i bits = _mm512_loadu_si512(from);
    if (past) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits);
    _mm512_storeu_si512(to, bits);
  }
  template <DType dtype>
  static void in_order(F* line) {
    if constexpr (dtype != DType::BF16) return;
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const F even = line[0];
    line[0] = _mm512_permutex2var_ps(even, low, line[1]);
    line[1] = _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), line[1]);
  }
  template <DType dtype>
  static void mask_line(const uint8_t* kept, int at, M* masks) {
    if constexpr (dtype == DType::F32) {
      masks[0] = mask_at(kept, at);
    } else {
      uint32_t mask;
      memcpy(&mask, kept + at / 8, sizeof mask);
      constexpr uint32_t first = dtype == DType::BF16 ? 0x55555555 : 0x0000ffff;
      masks[0] = static_cast<M>(_pext_u32(mask, first));
      masks[1] = static_cast<M>(_pext_u32(mask, ~first));
    }
  }
  static __m512i upper_halves() { return _mm512_set1_epi32(static_cast<int>(0xffff0000)); }
  // Rounded to nearest even in the upper half; AVX512-BF16 would flush denormals.
  static __m512i rounded(F value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
  }

  static M ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static M eq(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static M not_ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NGE_UQ); }
  static M not_le(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
  static M either(M a, M b) { return static_cast<M>(a | b); }
  static F pick(M mask, F yes, F no) { return _mm512_mask_blend_ps(mask, no, yes); }
  static F where(M mask, F yes) { return _mm512_maskz_mov_ps(mask, yes); }
  static F positive_part(F value) { return _mm512_max_ps(zero(), value); }
  static F negative_part(F value) { return _mm512_min_ps(zero(), value); }
  static F clip(F value, F low, F high) { return _mm512_min_ps(high, _mm512_max_ps(low, value)); }
  static F add_where(F sum, M mask, F term) { return _mm512_mask_add_ps(sum, mask, sum, term); }

  static U word(uint32_t value) { return {_mm512_set1_epi32(static_cast<int>(value))}; }
  static U load(const uint32_t* from) { return {_mm512_loadu_si512(from)}; }
  static void store(uint32_t* to, U value) { _mm512_storeu_si512(to, value.v); }
  static U magnitude(F value) { return {_mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff))}; }
  static F absolute(F value) { return _mm512_castsi512_ps(magnitude(value).v); }
  static U max(U a, U b) { return {_mm512_max_epu32(a.v, b.v)}; }
  static M at_least(U a, U b) { return _mm512_cmpge_epu32_mask(a.v, b.v); }
  static M equal(U a, U b) { return _mm512_cmpeq_epi32_mask(a.v, b.v); }
  static uint32_t bits(M mask) { return mask; }
  static M mask_at(const uint8_t* kept, int at) {
    uint16_t mask;
    memcpy(&mask, kept + at / 8, sizeof mask);
    return mask;
  }

  static D no_sum() { return _mm512_setzero_pd(); }
  static D low(F value) { return _mm512_cvtps_pd(_mm512_castps512_ps256(value)); }
  static D high(F value) {
    return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(value), 1)));
  }
  static D multiply_add(D a, D b, D sum) { return _mm512_fmadd_pd(a, b, sum); }
  static void store(double* to, D value) { _mm512_storeu_pd(to, value); }

  static P wide(uint32_t value) { return {_mm512_set1_epi64(value)}; }
  static P product(P a, P b) { return {_mm512_mul_epu32(a.v, b.v)}; }
  static P upper(P a) { return {_mm512_srli_epi64(a.v, 32)}; }
  static P exclusive_or(P a, P b, P c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
  // Lane 2 q + r works on counter 4 r + q, so that unpacking within 128 bits leaves the pieces in order.
  static P counters(uint32_t first) {
    return {_mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7))};
  }
  // Bits of the draws below `cut`; returns whether any is equal to it.
  static bool draws(const P (&words)[4], uint32_t cut, uint8_t* below) {
    const __m512i a = _mm512_mask_shuffle_epi32(words[0].v, 0xaaaa, words[1].v, _MM_PERM_CCAA);
    const __m512i b = _mm512_mask_shuffle_epi32(words[2].v, 0xaaaa, words[3].v, _MM_PERM_CCAA);
    const __m512i rows[2] = {_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)};
    const __m512i at = _mm512_set1_epi16(static_cast<short>(cut));
    uint32_t equal = 0;
    for (int row = 0; row < 2; ++row) {
      const uint32_t less = _mm512_cmplt_epu16_mask(rows[row], at);
      memcpy(below + 4 * row, &less, 4);
      equal |= _mm512_cmpeq_epi16_mask(rows[row], at);
    }
    return equal != 0;
  }
};

#elif defined(FASTMERGE_LANES_AVX2)

struct Lanes {
  using F = __m256;
  struct U {
    __m256i v;
  };
  struct M {
    __m256 v;
  };
  struct P {
    __m256i v;
  };
  using D = __m256d;
  static constexpr int width = 8;
  static constexpr int draws_at_once = 32;
  static constexpr const char* name = "avx2";

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float value) { return _mm256_set1_ps(value); }
  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
  template <DType dtype>
  static F read(const char* from) {
    if constexpr (dtype == DType::F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (dtype == DType::F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  template <DType dtype>
  static void write(char* to, F value) {
    if constexpr (dtype == DType::F32) return _mm256_storeu_ps(reinterpret_cast<float*>(to), value);
    __m128i half;
    if constexpr (dtype == DType::F16) {
      half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    } else {
      const __m256i up = _mm256_srli_epi32(rounded(value), 16);
      half = _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
  }

  template <DType dtype>
  static constexpr int vectors = dtype == DType::F32 ? 1 : 2;
  template <DType dtype>
  static constexpr int element(int vector, int lane) {
    return dtype == DType::BF16 ? 2 * lane + vector : vector * width + lane;
  }
  template <DType dtype>
  static void read_line(const char* from, F* line) {
    if constexpr (dtype == DType::BF16) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      line[0] = _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16));
      line[1] = _mm256_castsi256_ps(_mm256_and_si256(halves, upper_halves()));
    } else {
      line[0] = read<dtype>(from);
      if constexpr (dtype == DType::F16) line[1] = read<dtype>(from + 16);
    }
  }
  // Past the caches where `past` is true: then `to` is a multiple of 32.
  template <DType dtype>
  static void write_line(char* to, const F* line, bool past) {
    __m256i bits;
    if constexpr (dtype == DType::F32) {
      bits = _mm256_castps_si256(line[0]);
    } else if constexpr (dtype == DType::F16) {
      bits = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(line[0], _MM_FROUND_TO_NEAREST_INT)),
                                     _mm256_cvtps_ph(line[1], _MM_FROUND_TO_NEAREST_INT), 1);
    } else {
      const __m256i odd = _mm256_and_si256(rounded(line[1]), upper_halves());
      bits = _mm256_or_si256(_mm256_srli_epi32(rounded(line[0]), 16), odd);
    }
    if (past) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  }
  template <DType dtype>
  static void copy_line(const char* from, char* to, bool past) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if (past) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  }
  template <DType dtype>
  static void in_order(F* line) {
    if constexpr (dtype != DType::BF16) return;
    const F low = _mm256_unpacklo_ps(line[0], line[1]), high = _mm256_unpackhi_ps(line[0], line[1]);
    line[0] = _mm256_permute2f128_ps(low, high, 0x20);
    line[1] = _mm256_permute2f128_ps(low, high, 0x31);
  }
  template <DType dtype>
  static void mask_line(const uint8_t* kept, int at, M* masks) {
    masks[0] = mask_at(kept, at);
    if constexpr (dtype == DType::F16) masks[1] = mask_at(kept, at + width);
    if constexpr (dtype == DType::BF16) {
      uint16_t mask;
      memcpy(&mask, kept + at / 8, sizeof mask);
      const __m256i bit = _mm256_setr_epi32(1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 8, 1 << 10, 1 << 12, 1 << 14);
      for (int vector = 0; vector < 2; ++vector) {
        const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(mask >> vector), bit);
        masks[vector] = {_mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, bit))};
      }
    }
  }
  static __m256i upper_halves() { return _mm256_set1_epi32(static_cast<int>(0xffff0000)); }
  // Rounded to nearest even in the upper half.
  static __m256i rounded(F value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }

  static M ge(F a, F b) { return {_mm256_cmp_ps(a, b, _CMP_GE_OQ)}; }
  static M eq(F a, F b) { return {_mm256_cmp_ps(a, b, _CMP_EQ_OQ)}; }
  static M not_ge(F a, F b) { return {_mm256_cmp_ps(a, b, _CMP_NGE_UQ)}; }
  static M not_le(F a, F b) { return {_mm256_cmp_ps(a, b, _CMP_NLE_UQ)}; }
  static M either(M a, M b) { return {_mm256_or_ps(a.v, b.v)}; }
  static F pick(M mask, F yes, F no) { return _mm256_blendv_ps(no, yes, mask.v); }
  static F where(M mask, F yes) { return _mm256_and_ps(mask.v, yes); }
  static F positive_part(F value) { return _mm256_max_ps(zero(), value); }
  static F negative_part(F value) { return _mm256_min_ps(zero(), value); }
  static F clip(F value, F low, F high) { return _mm256_min_ps(high, _mm256_max_ps(low, value)); }
  static F add_where(F sum, M mask, F term) { return sum + where(mask, term); }

  static U word(uint32_t value) { return {_mm256_set1_epi32(static_cast<int>(value))}; }
  static U load(const uint32_t* from) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))}; }
  static void store(uint32_t* to, U value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value.v); }
  static U magnitude(F value) { return {_mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff))}; }
  static F absolute(F value) { return _mm256_castsi256_ps(magnitude(value).v); }
  static U max(U a, U b) { return {_mm256_max_epu32(a.v, b.v)}; }
  static M at_least(U a, U b) { return equal(max(a, b), a); }
  static M equal(U a, U b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
  static uint32_t bits(M mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask.v)); }
  static M mask_at(const uint8_t* kept, int at) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(kept[at / 8]), lane);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane))};
  }

  static D no_sum() { return _mm256_setzero_pd(); }
  static D low(F value) { return _mm256_cvtps_pd(_mm256_castps256_ps128(value)); }
  static D high(F value) { return _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1)); }
  static D multiply_add(D a, D b, D sum) { return _mm256_fmadd_pd(a, b, sum); }
  static void store(double* to, D value) { _mm256_storeu_pd(to, value); }

  static P wide(uint32_t value) { return {_mm256_set1_epi64x(value)}; }
  static P product(P a, P b) { return {_mm256_mul_epu32(a.v, b.v)}; }
  static P upper(P a) { return {_mm256_srli_epi64(a.v, 32)}; }
  static P exclusive_or(P a, P b, P c) { return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)}; }
  // Lane 2 q + r works on counter 2 r + q, so that unpacking within 128 bits leaves the pieces in order.
  static P counters(uint32_t first) {
    return {_mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 2, 1, 3))};
  }
  static bool draws(const P (&words)[4], uint32_t cut, uint8_t* below) {
    const __m256i a = _mm256_blend_epi32(words[0].v, _mm256_slli_epi64(words[1].v, 32), 0xaa);
    const __m256i b = _mm256_blend_epi32(words[2].v, _mm256_slli_epi64(words[3].v, 32), 0xaa);
    const __m256i rows[2] = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)};
    const __m256i at = _mm256_set1_epi16(static_cast<short>(cut));
    __m256i equal = _mm256_setzero_si256();
    for (int row = 0; row < 2; ++row) {
      const uint32_t less = ~narrow(_mm256_cmpeq_epi16(_mm256_max_epu16(rows[row], at), rows[row]));
      memcpy(below + 2 * row, &less, 2);
      equal = _mm256_or_si256(equal, _mm256_cmpeq_epi16(rows[row], at));
    }
    return _mm256_testz_si256(equal, equal) == 0;
  }
  static uint32_t narrow(__m256i mask16) {  // sixteen 16-bit masks -> sixteen bits
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(mask16), _mm256_extracti128_si256(mask16, 1));
    return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
  }
};

#elif defined(FASTMERGE_LANES_NEON)

struct Lanes {
  using F = float32x4_t;
  struct U {
    uint32x4_t v;
  };
  struct M {
    uint32x4_t v;
  };
  struct P {
    uint64x2_t v;
  };
  using D = float64x2_t;
  static constexpr int width = 4;
  static constexpr int draws_at_once = 16;
  static constexpr const char* name = "neon";

  static F zero() { return vdupq_n_f32(0.0f); }
  static F set(float value) { return vdupq_n_f32(value); }
  static F load(const float* from) { return vld1q_f32(from); }
  static void store(float* to, F value) { vst1q_f32(to, value); }
  template <DType dtype>
  static F read(const char* from) {
    if constexpr (dtype == DType::F32) {
      return vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(from)));
    } else {
      const uint16x4_t half = vreinterpret_u16_u8(vld1_u8(reinterpret_cast<const uint8_t*>(from)));
      if constexpr (dtype == DType::F16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
      return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
    }
  }
  template <DType dtype>
  static void write(char* to, F value) {
    if constexpr (dtype == DType::F32) {
      vst1q_u8(reinterpret_cast<uint8_t*>(to), vreinterpretq_u8_f32(value));
    } else {
      uint16x4_t half;
      if constexpr (dtype == DType::F16) {
        half = vreinterpret_u16_f16(vcvt_f16_f32(value));
      } else {
        half = vshrn_n_u32(rounded(value), 16);
      }
      vst1_u8(reinterpret_cast<uint8_t*>(to), vreinterpret_u8_u16(half));
    }
  }

  template <DType dtype>
  static constexpr int vectors = dtype == DType::F32 ? 1 : 2;
  template <DType dtype>
  static constexpr int element(int vector, int lane) {
    return dtype == DType::BF16 ? 2 * lane + vector : vector * width + lane;
  }
  template <DType dtype>
  static void read_line(const char* from, F* line) {
    if constexpr (dtype == DType::BF16) {
      const uint32x4_t halves = vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(from)));
      line[0] = vreinterpretq_f32_u32(vshlq_n_u32(halves, 16));
      line[1] = vreinterpretq_f32_u32(vandq_u32(halves, vdupq_n_u32(0xffff0000)));
    } else {
      line[0] = read<dtype>(from);
      if constexpr (dtype == DType::F16) line[1] = read<dtype>(from + 8);
    }
  }
  template <DType dtype>
  static void write_line(char* to, const F* line, bool) {
    if constexpr (dtype == DType::BF16) {
      const uint32x4_t odd = vandq_u32(rounded(line[1]), vdupq_n_u32(0xffff0000));
      const uint32x4_t bits = vorrq_u32(vshrq_n_u32(rounded(line[0]), 16), odd);
      vst1q_u8(reinterpret_cast<uint8_t*>(to), vreinterpretq_u8_u32(bits));
    } else {
      write<dtype>(to, line[0]);
      if constexpr (dtype == DType::F16) write<dtype>(to + 8, line[1]);
    }
  }
  template <DType dtype>
  static void copy_line(const char* from, char* to, bool) {
    vst1q_u8(reinterpret_cast<uint8_t*>(to), vld1q_u8(reinterpret_cast<const uint8_t*>(from)));
  }
  template <DType dtype>
  static void in_order(F* line) {
    if constexpr (dtype != DType::BF16) return;
    const F even = line[0];
    line[0] = vzip1q_f32(even, line[1]);
    line[1] = vzip2q_f32(even, line[1]);
  }
  template <DType dtype>
  static void mask_line(const uint8_t* kept, int at, M* masks) {
    if constexpr (dtype == DType::F32) {
      masks[0] = mask_at(kept, at);
    } else {
      const uint32_t even[4] = {1, 4, 16, 64}, odd[4] = {2, 8, 32, 128}, low[4] = {1, 2, 4, 8},
                     high[4] = {16, 32, 64, 128};
      const uint32x4_t byte = vdupq_n_u32(kept[at / 8]);
      masks[0] = {vtstq_u32(byte, vld1q_u32(dtype == DType::BF16 ? even : low))};
      masks[1] = {vtstq_u32(byte, vld1q_u32(dtype == DType::BF16 ? odd : high))};
    }
  }
  // Rounded to nearest even in the upper half.
  static uint32x4_t rounded(F value) {
    const uint32x4_t word = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(word, 16), vdupq_n_u32(1));
    return vaddq_u32(vaddq_u32(word, vdupq_n_u32(0x7fff)), odd);
  }

  static M ge(F a, F b) { return {vcgeq_f32(a, b)}; }
  static M eq(F a, F b) { return {vceqq_f32(a, b)}; }
  static M not_ge(F a, F b) { return {vmvnq_u32(vcgeq_f32(a, b))}; }
  static M not_le(F a, F b) { return {vmvnq_u32(vcleq_f32(a, b))}; }
  static M either(M a, M b) { return {vorrq_u32(a.v, b.v)}; }
  static F pick(M mask, F yes, F no) { return vbslq_f32(mask.v, yes, no); }
  static F where(M mask, F yes) { return vreinterpretq_f32_u32(vandq_u32(mask.v, vreinterpretq_u32_f32(yes))); }
  static F positive_part(F value) { return vmaxq_f32(zero(), value); }
  static F negative_part(F value) { return vminq_f32(zero(), value); }
  static F clip(F value, F low, F high) { return vminq_f32(high, vmaxq_f32(low, value)); }
  static F add_where(F sum, M mask, F term) { return sum + where(mask, term); }

  static U word(uint32_t value) { return {vdupq_n_u32(value)}; }
  static U load(const uint32_t* from) { return {vld1q_u32(from)}; }
  static void store(uint32_t* to, U value) { vst1q_u32(to, value.v); }
  static U magnitude(F value) { return {vandq_u32(vreinterpretq_u32_f32(value), vdupq_n_u32(0x7fffffff))}; }
  static F absolute(F value) { return vabsq_f32(value); }
  static U max(U a, U b) { return {vmaxq_u32(a.v, b.v)}; }
  static M at_least(U a, U b) { return {vcgeq_u32(a.v, b.v)}; }
  static M equal(U a, U b) { return {vceqq_u32(a.v, b.v)}; }
  static uint32_t bits(M mask) {
    const uint32_t lane[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(mask.v, vld1q_u32(lane)));
  }
  static M mask_at(const uint8_t* kept, int at) {
    const uint32_t lane[4] = {1, 2, 4, 8};
    const uint32x4_t nibble = vdupq_n_u32(static_cast<uint32_t>(kept[at / 8] >> (at % 8)));
    return {vtstq_u32(nibble, vld1q_u32(lane))};
  }

  static D no_sum() { return vdupq_n_f64(0.0); }
  static D low(F value) { return vcvt_f64_f32(vget_low_f32(value)); }
  static D high(F value) { return vcvt_high_f64_f32(value); }
  static D multiply_add(D a, D b, D sum) { return vfmaq_f64(sum, a, b); }
  static void store(double* to, D value) { vst1q_f64(to, value); }

  static P wide(uint32_t value) { return {vdupq_n_u64(value)}; }
  static P product(P a, P b) { return {vmull_u32(vmovn_u64(a.v), vmovn_u64(b.v))}; }
  static P upper(P a) { return {vshrq_n_u64(a.v, 32)}; }
  static P exclusive_or(P a, P b, P c) { return {veorq_u64(veorq_u64(a.v, b.v), c.v)}; }
  static P counters(uint32_t first) { return {vcombine_u64(vcreate_u64(first), vcreate_u64(first + 1ull))}; }
  static bool draws(const P (&words)[4], uint32_t cut, uint8_t* below) {
    const uint64x2_t a = vsliq_n_u64(words[0].v, words[1].v, 32), b = vsliq_n_u64(words[2].v, words[3].v, 32);
    const uint64x2_t rows[2] = {vzip1q_u64(a, b), vzip2q_u64(a, b)};
    const uint16_t bit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint16x8_t at = vdupq_n_u16(static_cast<uint16_t>(cut)), weight = vld1q_u16(bit);
    uint16x8_t equal = vdupq_n_u16(0);
    for (int row = 0; row < 2; ++row) {
      const uint16x8_t pieces = vreinterpretq_u16_u64(rows[row]);
      below[row] = static_cast<uint8_t>(vaddvq_u16(vandq_u16(vcltq_u16(pieces, at), weight)));
      equal = vorrq_u16(equal, vceqq_u16(pieces, at));
    }
    return vmaxvq_u16(equal) != 0;
  }
};

#else

struct Lanes {
  using F = float;
  using U = uint32_t;
  using M = bool;
  using P = uint64_t;
  using D = double;
  static constexpr int width = 1;
  static constexpr int draws_at_once = 8;
  static constexpr const char* name = "scalar";

  static F zero() { return 0.0f; }
  static F set(float value) { return value; }
  static F load(const float* from) { return *from; }
  static void store(float* to, F value) { *to = value; }
  template <DType dtype>
  static F read(const char* from) {
    if constexpr (dtype == DType::F32) {
      float value;
      memcpy(&value, from, sizeof value);
      return value;
    } else {
      uint16_t half;
      memcpy(&half, from, sizeof half);
      return dtype == DType::F16 ? from_f16(half) : from_bf16(half);
    }
  }
  template <DType dtype>
  static void write(char* to, F value) {
    if constexpr (dtype == DType::F32) {
      memcpy(to, &value, sizeof value);
    } else {
      const uint16_t half = dtype == DType::F16 ? to_f16(value) : to_bf16(value);
      memcpy(to, &half, sizeof half);
    }
  }

  template <DType dtype>
  static constexpr int vectors = 1;
  template <DType dtype>
  static constexpr int element(int, int) {
    return 0;
  }
  template <DType dtype>
  static void read_line(const char* from, F* line) {
    *line = read<dtype>(from);
  }
  template <DType dtype>
  static void write_line(char* to, const F* line, bool) {
    write<dtype>(to, *line);
  }
  template <DType dtype>
  static void copy_line(const char* from, char* to, bool) {
    memcpy(to, from, dtype == DType::F32 ? 4 : 2);
  }
  template <DType dtype>
  static void in_order(F*) {}
  template <DType dtype>
  static void mask_line(const uint8_t* kept, int at, M* masks) {
    *masks = mask_at(kept, at);
  }

  static M ge(F a, F b) { return a >= b; }
  static M eq(F a, F b) { return a == b; }
  static M not_ge(F a, F b) { return !(a >= b); }
  static M not_le(F a, F b) { return !(a <= b); }
  static M either(M a, M b) { return a || b; }
  static F pick(M mask, F yes, F no) { return mask ? yes : no; }
  static F where(M mask, F yes) { return mask ? yes : 0.0f; }
  static F positive_part(F value) { return value <= 0.0f ? 0.0f : value; }
  static F negative_part(F value) { return value >= 0.0f ? 0.0f : value; }
  static F clip(F value, F low, F high) { return value < low ? low : value > high ? high : value; }
  static F add_where(F sum, M mask, F term) { return sum + where(mask, term); }

  static U word(uint32_t value) { return value; }
  static U load(const uint32_t* from) { return *from; }
  static void store(uint32_t* to, U value) { *to = value; }
  static U magnitude(F value) { return to_bits(value) & 0x7fffffff; }
  static F absolute(F value) { return from_bits(magnitude(value)); }
  static U max(U a, U b) { return a > b ? a : b; }
  static M at_least(U a, U b) { return a >= b; }
  static M equal(U a, U b) { return a == b; }
  static uint32_t bits(M mask) { return mask; }
  static M mask_at(const uint8_t* kept, int at) { return (kept[at / 8] >> (at % 8)) & 1; }

  static D no_sum() { return 0.0; }
  static D low(F value) { return value; }
  static D multiply_add(D a, D b, D sum) { return a * b + sum; }
  static void store(double* to, D value) { *to = value; }

  static P wide(uint32_t value) { return value; }
  static P product(P a, P b) { return (a & 0xffffffff) * (b & 0xffffffff); }
  static P upper(P a) { return a >> 32; }
  static P exclusive_or(P a, P b, P c) { return a ^ b ^ c; }
  static P counters(uint32_t first) { return first; }
  static bool draws(const P (&words)[4], uint32_t cut, uint8_t* below) {
    *below = 0;
    bool equal = false;
    for (int piece = 0; piece < 8; ++piece) {
      const uint32_t draw = static_cast<uint32_t>(words[piece / 2] >> (16 * (piece % 2))) & 0xffff;
      *below = static_cast<uint8_t>(*below | (draw < cut) << piece);
      equal |= draw == cut;
    }
    return equal;
  }
};

#endif

}  // namespace
}  // namespace fastmerge
