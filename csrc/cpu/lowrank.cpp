// The op `lowrank`: rows of the output, a few at a time, by any thread.
#include <algorithm>

#include "ops.h"

namespace fastmerge {
namespace {

// Elements that a worker makes at a time.
constexpr int64_t ITEM = 1 << 15;
constexpr int64_t ROWS = 8;         // what every instruction set takes together
constexpr int64_t WORTH = 1 << 23;  // products of two numbers that take a few times as long as a thread to begin

}  // namespace

void lowrank(const LowRank& product, int64_t rows, const Crew& crew) {
  if (product.width == 0) return;
  const int64_t step = (std::max<int64_t>(ITEM / product.width, 1) + ROWS - 1) / ROWS * ROWS;
  const int64_t most = std::max<int64_t>(rows * product.width * product.rank / WORTH, 1);
  const int threads = static_cast<int>(std::min<int64_t>(crew.threads, most));
  parallel((rows + step - 1) / step, threads, 0, crew.tick, [&](int64_t item, char*) {
    const int64_t begin = item * step, end = std::min(begin + step, rows);
    crew.kernels->lowrank(product, begin, end);
    return (end - begin) * product.width * size_of(product.dtype);
  });
}

}  // namespace fastmerge
