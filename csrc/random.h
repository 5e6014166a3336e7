// Random bits as a pure function of (key, flat index): Philox4x32, seven rounds (Salmon et al., SC'11).
//
// One counter serves eight elements: counter e / 8 gives four words, eight 16-bit pieces, low half first, and element e
// takes piece e % 8. An element is kept when its piece is below the upper half of the cut; on equality (once in 65536)
// the same piece of a second stream decides against the lower half, so a probability has 32 bits for the price of 16.
#pragma once
#include "dtype.h"

namespace fastmerge {
namespace {

constexpr int PHILOX_ROUNDS = 7;
constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57;
constexpr uint32_t PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;

struct Words {
  uint32_t word[4];
};

FASTMERGE_INLINE uint64_t product_of(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;  // nvcc would multiply all 64 bits, and add the zeros that come of it
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

FASTMERGE_INLINE Words philox(uint64_t counter, uint32_t stream, uint64_t key) {
  uint32_t x0 = static_cast<uint32_t>(counter), x1 = static_cast<uint32_t>(counter >> 32), x2 = stream, x3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const uint64_t p0 = product_of(PHILOX_M0, x0), p1 = product_of(PHILOX_M1, x2);
    x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(p1);
    x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(p0);
    k0 += PHILOX_W0;
    k1 += PHILOX_W1;
  }
  return {{x0, x1, x2, x3}};
}

FASTMERGE_INLINE uint32_t piece_of(const Words& words, int64_t element) {
  return (words.word[(element & 7) >> 1] >> (16 * (element & 1))) & 0xffff;
}

FASTMERGE_INLINE bool equals_upper(int64_t element, uint64_t key, uint32_t upper) {
  return piece_of(philox(static_cast<uint64_t>(element) / 8, 0, key), element) == upper;
}

// The second draw, for an element whose first piece equals the upper half of the cut.
FASTMERGE_INLINE bool kept_on_equal(int64_t element, uint64_t key, uint64_t cut) {
  return piece_of(philox(static_cast<uint64_t>(element) / 8, 1, key), element) < (cut & 0xffff);
}

}  // namespace
}  // namespace fastmerge
