// The n-th largest of a few thousand magnitudes, which the selections guess from.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../dtype.h"

namespace fastmerge {
namespace {

// Leaves those from the first-largest to the last-largest (from 0), and a few around them, at the front; lowers `count`
// to how many these are, and returns how many larger ones are gone. By a histogram of the upper bits.
inline int64_t narrow_to(uint32_t* magnitudes, int64_t& count, int64_t first, int64_t last) {
  constexpr int SHIFT = 19;
  int32_t bins[(INFINITE >> SHIFT) + 1] = {};
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    ++bins[magnitudes[i] >> SHIFT];
    largest = std::max(largest, magnitudes[i]);
  }
  int64_t gone = 0;
  uint32_t high = largest >> SHIFT;
  for (; gone + bins[high] <= first; --high) gone += bins[high];
  uint32_t low = high;
  for (int64_t end = gone + bins[low]; end <= last; end += bins[low]) --low;
  const uint32_t least = low << SHIFT, range = ((high - low + 1) << SHIFT) - 1;
  int64_t left = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = magnitudes[i];
    magnitudes[left] = magnitude;
    left += magnitude - least <= range;
  }
  count = left;
  return gone;
}

}  // namespace
}  // namespace fastmerge
