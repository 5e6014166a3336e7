// The ops over whole tensors on the current GPU. Each queues its work on a stream; those that return numbers wait for
// it.
#pragma once
#include <cuda_runtime.h>

#include <vector>

#include "../sweep.h"

namespace fastmerge {

// One tensor of a merge: K sweeps, K x models parts, K targets; and what is found, inputs and K long.
struct Merge {
  Tensor tensor;
  int64_t begin;  // flat index of its first element, a multiple of 8
  int settings;
  const Sweep* sweeps;
  const Part* parts;
  const Target* targets;
  int64_t* nonfinite;
  int64_t* first;
  int64_t* overflow;
};

// Tensors taken as one concatenated vector, all of the same number of models.
using Group = std::vector<Tensor>;

void merge(const std::vector<Merge>& merges, cudaStream_t stream);

// One tensor, in one launch, without Found; nothing is copied from the host, so that a graph can capture it. `cuts`
// (one per model, in device memory) stand in for the parts' own where they are given.
void merge_async(const Merge& merge, const Cut* cuts, cudaStream_t stream);

// products[t]: models x models.
void gram(const std::vector<Tensor>& tensors, const std::vector<double*>& products, cudaStream_t stream);

// sums[t]: models x {before, after} x {L1, L2, Linf}. sweeps[t] with parts[t] say what is kept.
void norms(const std::vector<Tensor>& tensors, const std::vector<const Sweep*>& sweeps,
           const std::vector<const Part*>& parts, const std::vector<int64_t>& begins, const std::vector<double*>& sums,
           cudaStream_t stream);

// cuts[g][m]: keeps exactly ranks[g][m] elements of model m of group g.
void threshold(const std::vector<Group>& groups, const std::vector<const int64_t*>& ranks,
               const std::vector<Cut*>& cuts, cudaStream_t stream);

// One tensor; cuts[models] and the workspace lie in device memory. A graph can capture it.
void threshold_async(const Tensor& tensor, const int64_t* ranks, Cut* cuts, void* workspace, cudaStream_t stream);
size_t workspace_bytes(int64_t elements, int models);

// Each tensor's cuts (ranks and cuts: one per model), then its merge by these cuts: one launch for all tensors.
void merge_ranked(const std::vector<Merge>& merges, const std::vector<const int64_t*>& ranks,
                  const std::vector<Cut*>& cuts, cudaStream_t stream);

// The same for tensors that are worth a guess, all of one vote: each is read once where the guess was right.
void merge_guessed(const std::vector<Merge>& merges, const std::vector<const int64_t*>& ranks,
                   const std::vector<Cut*>& cuts, cudaStream_t stream);
bool worth_a_guess(const Tensor& tensor);

// What one call of an op is given at most: for the memory that it takes beside that, in bytes.
struct Most {
  int64_t tensors, elements;  // of all tensors together
  int models;
  int settings;
  int ranks;  // of one selection; each setting may want its own
};
size_t tables_bytes(const Most& most);     // on the device, and up to twice that pinned
size_t measuring_bytes(const Most& most);  // on the device, as the next two
size_t selecting_bytes(const Most& most);
size_t ranked_bytes(const Most& most);
size_t guessed_bytes(const Most& most);

// Gives back what ops keep from call to call on the current device.
void release_kept();

}  // namespace fastmerge
