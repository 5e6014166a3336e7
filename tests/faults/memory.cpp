// A crew that is begun while memory runs out: each allocation of its caller fails in turn. Prints how often the work
// was done and how often it was refused; ends with 1 where an item was left out, done twice, or done after the end.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>

#include "../../csrc/cpu/parallel.h"

thread_local int64_t allocations_left = -1;  // none fails

void* operator new(std::size_t bytes) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  if (void* block = std::malloc(bytes)) return block;
  throw std::bad_alloc();
}
void operator delete(void* block) noexcept {
  std::free(block);
}
void operator delete(void* block, std::size_t) noexcept {
  std::free(block);
}

int main() {
  constexpr int64_t ITEMS = 1000, ALLOCATIONS = 40;
  static std::atomic<int> times[ITEMS];
  static std::atomic<int64_t> begun;
  static std::atomic<bool> ended, wrong{false};
  static const std::thread::id caller = std::this_thread::get_id();
  const fastmerge::Work work = [](int64_t item, char*) {
    ++begun;
    while (std::this_thread::get_id() != caller && begun < ITEMS && !ended) continue;  // the caller leaves first
    if (ended) wrong = true;
    ++times[item];
    return int64_t{0};
  };
  int done = 0, refused = 0;
  for (int64_t fails = 0; fails < ALLOCATIONS; ++fails) {
    for (std::atomic<int>& each : times) each = 0;
    begun = 0;
    ended = false;
    bool threw = false;
    allocations_left = fails;
    try {
      fastmerge::parallel(ITEMS, 4, 64, {}, work);
    } catch (const std::bad_alloc&) {
      threw = true;
    }
    ended = true;
    allocations_left = -1;
    ++(threw ? refused : done);
    for (std::atomic<int>& each : times) wrong = wrong || each > 1 || (!threw && each == 0);
  }
  std::printf("%d done, %d refused\n", done, refused);
  return wrong || done + refused != ALLOCATIONS;
}
