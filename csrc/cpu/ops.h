// The four ops over whole tensors, on the kernels of one instruction set: tiles, threads, and the order of sums.
#pragma once
#include <cstdint>
#include <vector>

#include "hash.h"
#include "kernels.h"
#include "parallel.h"

namespace fastmerge {

struct Crew {
  const Kernels* kernels;
  int threads;
  int64_t tile;  // elements; 0: chosen here
  Tick tick;
  Hash hash = nullptr;  // of what is written to files; none: not wanted
};

// One tensor of a merge: K sweeps, K x models parts, K targets; and what is found, inputs and K long. `hashes`, too,
// are K: those of the pieces of each output, where hashing is wanted and the output goes to a file.
struct Merge {
  Tensor tensor;
  int settings;
  const Sweep* sweeps;
  const Part* parts;
  const Target* targets;
  int64_t* nonfinite;
  int64_t* first;
  int64_t* overflow;
  PieceHashes* hashes;
};

// Throws std::system_error when a target cannot be written.
void merge(const std::vector<Merge>& merges, const Crew& crew);

// products[t]: models x models.
void gram(const std::vector<Tensor>& tensors, const std::vector<double*>& products, const Crew& crew);

// sums[t]: models x {before, after} x {L1, L2, Linf}. sweeps[t] with parts[t] say what is kept.
void norms(const std::vector<Tensor>& tensors, const std::vector<const Sweep*>& sweeps,
           const std::vector<const Part*>& parts, const std::vector<double*>& sums, const Crew& crew);

// Tensors taken as one concatenated vector, all of the same number of models.
using Group = std::vector<Tensor>;

// cuts[g][m]: keeps exactly ranks[g][m] elements of model m of group g.
void threshold(const std::vector<Group>& groups, const std::vector<const int64_t*>& ranks,
               const std::vector<Cut*>& cuts, const Crew& crew);

// The op `threshold` of each tensor alone, then `merge` with those cuts in the parts of each of its settings, all of
// which keep ABOVE. The parts that come are read for what else they say. One read of large tensors in nearly all cases.
void merge_ranked(const std::vector<Merge>& merges, const std::vector<const int64_t*>& ranks,
                  const std::vector<Cut*>& cuts, const Crew& crew);

// Rows [0, rows) of the product.
void lowrank(const LowRank& product, int64_t rows, const Crew& crew);

}  // namespace fastmerge
