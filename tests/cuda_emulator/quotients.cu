// Divisions of 24-bit numbers whose quotients lie as near as any can to the middle between two floats, where an error
// in the last step shows; by the steps that kernels take, with reciprocals that are off by one unit either way.
#include "lanes.h"

using namespace fastmerge;

namespace {

constexpr uint32_t LEAST = 1 << 23, END = 1 << 24;  // of 24 bits

bool is_right(uint32_t dividend, uint32_t divisor) {
  for (const float scale :
       {0x1p-23f, 0x1p-22f, 0x1p-21f, 0x1p-19f, 0x1p-16f}) {  // the emulated reciprocals of each differ
    const float a = static_cast<float>(dividend), b = static_cast<float>(divisor) * scale;
    if (to_bits(quotient(a, b, reciprocal(b))) != to_bits(a / b)) return false;
  }
  return true;
}

}  // namespace

// Tries divisors first, first + step, ..., each odd: for a middle m / 2 and a difference d, m b = 2^k a + d. Returns
// how many divisions were tried; those that went wrong are in (dividend, divisor) of wrong[most], in `count` how many.
extern "C" [[gnu::visibility("default")]] int64_t try_quotients(uint32_t first, uint32_t step, uint32_t (*wrong)[2],
                                                                int most, int* count) {
  int64_t tried = 0;
  for (uint64_t divisor = first; divisor < END; divisor += step) {
    uint64_t inverse = divisor;  // modulo powers of two
    for (int i = 0; i < 5; ++i) inverse *= 2 - divisor * inverse;
    for (const int k : {24, 25}) {
      for (int64_t d = -7; d <= 7; d += 2) {
        const uint64_t rest = inverse * static_cast<uint64_t>(d) & ((uint64_t{1} << k) - 1);
        const uint64_t middle = k == 24 ? rest + END : rest;
        const uint64_t dividend = (middle * divisor - static_cast<uint64_t>(d)) >> k;
        if (middle < END || dividend < LEAST || dividend >= END) continue;
        ++tried;
        if (is_right(static_cast<uint32_t>(dividend), static_cast<uint32_t>(divisor))) continue;
        if (*count < most) {
          wrong[*count][0] = static_cast<uint32_t>(dividend);
          wrong[*count][1] = static_cast<uint32_t>(divisor);
        }
        ++*count;
      }
    }
  }
  return tried;
}
