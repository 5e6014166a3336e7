// Runs items on a crew: the caller's thread and those that hands.h keeps.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>

namespace fastmerge {

// Called on the caller's thread every 50 ms, between its items, and at the end, with the bytes read since the last
// call; may throw to stop.
using Tick = std::function<void(int64_t)>;
// Does one item with the worker's own memory, and returns the bytes it read.
using Work = std::function<int64_t(int64_t item, char* scratch)>;

// A mapped input ended before it should: its file was cut while it was read.
struct InputCut : std::runtime_error {
  InputCut() : std::runtime_error("a mapped input was cut while it was read") {}
};

// Runs work(0) ... work(items - 1), each once, in any order, on `threads` threads with `scratch_bytes` of memory each.
// The first exception, of an item or of the tick, stops the rest (items under way finish) and is thrown here.
void parallel(int64_t items, int threads, size_t scratch_bytes, const Tick& tick, const Work& work);

}  // namespace fastmerge
