// What a random `keep` leaves of eight elements: one Philox counter serves them.
#pragma once
#include "../random.h"
#include "device.h"

namespace fastmerge {
namespace {

// Where the bit of an element is: two halves of a word are compared at once, which leaves the answers at their tops.
constexpr FASTMERGE_INLINE int kept_bit(int element) {
  return (element % 2 ? 31 : 15) - element / 2;
}
constexpr int KEPT_BITS =
    4;  // of each half of a word: shifted right by so many, those of another eight fit beside them

// Which of the eight elements from `flat` stay, a bit each.
__device__ __forceinline__ uint32_t drawn(uint64_t key, uint64_t cut, int64_t flat) {
  constexpr uint32_t tops = 0x80008000;
  if (cut >> 32) return 0xf000f000;
  const uint64_t counter = static_cast<uint64_t>(flat) / EIGHT;
  const uint32_t upper = static_cast<uint32_t>(cut >> 16), both = upper | upper << 16;
  const Words words = philox(counter, 0, key);
  uint32_t kept = 0, equal = 0;  // equal: a top is set where some half may be `upper`
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = words.word[i];
    const uint32_t least = (word | tops) - (both & ~tops);  // a top is set where what is below it is no less
    kept |= (((~word & both) | ~((word ^ both) | least)) & tops) >> i;
    equal |= least & ~(least - 0x00010001);
  }
  if (equal & tops) {
    const Words second = philox(counter, 1, key);
    for (int i = 0; i < EIGHT; ++i) {
      kept |= uint32_t{piece_of(words, i) == upper && piece_of(second, i) < (cut & 0xffff)} << kept_bit(i);
    }
  }
  return kept;
}

}  // namespace
}  // namespace fastmerge
