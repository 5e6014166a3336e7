// Many selections in one launch: the large ones are the work of the whole grid, one after another; of the others each
// block takes one at a time.
#pragma once
#include <algorithm>
#include <vector>

#include "select.h"

namespace fastmerge {
namespace {

// In device memory, zero before the launch.
struct Turn {
  Barrier barrier;
  int taken;  // of those that are one block's work
};

struct Queue {
  int large, count;  // the large ones first
  Room together, alone;
  Turn* turn;
  char* workspace;  // the grid's, then each block's

  size_t bytes(int blocks) const { return together.bytes() + static_cast<size_t>(blocks) * alone.bytes(); }
};

// How much there is to do for one of them.
struct Load {
  int64_t elements, tiles;
  int models;
};

// Puts the large ones first: more than its share of the elements would keep one block busy while the others have
// nothing left to do. The queue lacks its turn and its workspace.
template <class Job, class LoadOf>
Queue queue_of(std::vector<Job>& jobs, const LoadOf& load_of, int blocks) {
  int64_t total = 0;
  for (const Job& job : jobs) total += load_of(job).elements;
  const int64_t most = std::max<int64_t>(SAMPLES, total / blocks);
  const auto middle =
      std::stable_partition(jobs.begin(), jobs.end(), [&](const Job& job) { return load_of(job).elements > most; });
  const auto room_of = [&](auto begin, auto end, int team_blocks) {
    Load largest = {0, 0, 0};
    for (; begin != end; ++begin) {
      const Load load = load_of(*begin);
      largest = {std::max(largest.elements, load.elements), std::max(largest.tiles, load.tiles),
                 std::max(largest.models, load.models)};
    }
    return room_for(largest.models, largest.elements, largest.tiles, team_blocks);
  };
  const Room together = room_of(jobs.begin(), middle, blocks), alone = room_of(middle, jobs.end(), 1);
  return {static_cast<int>(middle - jobs.begin()), static_cast<int>(jobs.size()), together, alone, nullptr, nullptr};
}

// No fewer than the bytes of any queue that so many blocks have.
inline size_t queue_bytes(const Most& most, int blocks) {
  const int64_t elements = most.elements * most.settings, tiles = tiles_in(elements) + most.tensors * most.settings;
  const Room together = room_for(most.ranks, elements, tiles, blocks);
  const Room alone = room_for(most.ranks, elements, tiles_in(elements / blocks) + 1, 1);
  return together.bytes() + static_cast<size_t>(blocks) * alone.bytes();
}

// What a block does now; in shared memory, so that it takes no registers.
struct Task {
  int number;  // -1 before the first
  Team team;
  Selection in;
  Room room;
  char* workspace;
};
// The block's next task, once every thread is done with the last one; false where there is none left.
template <class SelectionOf>
__device__ __forceinline__ bool take(const Queue& queue, Task& task, const SelectionOf& selection_of) {
  sync_block();
  if (threadIdx.x == 0) {
    const bool large = ++task.number < queue.large;
    if (!large) task.number = queue.large + atomicAdd(&queue.turn->taken, 1);
    task.team = {&queue.turn->barrier, large ? static_cast<int>(gridDim.x) : 1,
                 large ? static_cast<int>(blockIdx.x) : 0};
    task.room = large ? queue.together : queue.alone;
    task.workspace = queue.workspace + (large ? 0 : queue.together.bytes() + blockIdx.x * queue.alone.bytes());
    if (task.number < queue.count) task.in = selection_of(task.number, task.team);
  }
  sync_block();
  return task.number < queue.count;
}

__device__ inline void select(const Task& task) {
  select(task.team, task.in, task.room, task.workspace, shared_memory());
}

}  // namespace
}  // namespace fastmerge
