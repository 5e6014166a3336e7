// Threads that wait for work between calls: to begin one takes as long as a small merge, and a new one may be left
// waiting for the processor of the thread that began it.
#pragma once
#include <functional>
#include <memory>

namespace fastmerge {

// Neither throws.
struct Job {
  std::function<void()> work, finished;
};

// Runs work(), then finished(), on a thread that waits or on a new one, which may be had again when finished() begins.
// False where the machine gives no more threads or memory.
bool hand_over(std::shared_ptr<const Job> job) noexcept;

}  // namespace fastmerge
