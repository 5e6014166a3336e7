// Sweeps over parts of tensors, which the ops `merge` and `merge_ranked` are made of.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

#include "ops.h"

namespace fastmerge {

// How many elements of each model are kept and how many equal its magnitude, chunk by chunk: [chunks][models][2].
struct Counts {
  std::vector<uint16_t> each;
  std::atomic<bool> odd{false};  // something is not finite or overflowed: then the counts say nothing
};

struct Tile {
  const Merge* merge;
  int64_t begin, end;  // multiples of its grain, or the end of the tensor
  Counts* counts;      // filled where given, and what is odd is left as it comes
};

// The elements by which a merge is cut into tiles: a chunk, or what fills whole pieces of each output that are hashed.
int64_t grain(const Merge& merge, const Crew& crew);

// Adds tiles that cover [begin, end) of a merge.
void cover(const Merge& merge, int64_t begin, int64_t end, const Crew& crew, Counts* counts, std::vector<Tile>& tiles);

void sweep(const std::vector<Tile>& tiles, const Crew& crew);

}  // namespace fastmerge
