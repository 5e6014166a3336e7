// Threads that wait for work between calls: to begin one takes as long as a small merge, and a new one may be left
// waiting for the processor of the thread that began it.
#pragma once
#include <functional>

namespace fastmerge {

using Job = std::function<void()>;

// Runs work(), then finished(), on a thread that waits or on a new one, which may be had again when finished() begins.
// Neither throws. False where the machine gives no more threads.
bool hand_over(Job work, Job finished);

}  // namespace fastmerge
