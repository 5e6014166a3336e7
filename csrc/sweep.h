// The vocabulary of a merge, as in fastmerge/sweep.py: plain data that every kernel reads and none owns.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace fastmerge {

enum class Keep : uint8_t { ALL = 0, ABOVE = 1, BERNOULLI = 2, BAND = 3, CLIP = 4 };
enum class Elect : uint8_t { NONE = 0, WEIGHTED = 1, PLAIN = 2, COUNT = 3 };
enum class TieVote : uint8_t { POSITIVE = 0, ZERO = 1 };
enum class Mean : uint8_t { SUM = 0, WEIGHTS = 1, COUNT = 2, CONTRIBUTORS = 3 };

// The layouts of Row, View, Part, Sweep and Target are those of the record arrays that fastmerge/records.py fills.

// A tensor; its views, parts, sweeps and targets follow one another in the other arrays.
struct Row {
  int64_t elements;
  int64_t begin;  // flat index of the first element; not 0, a multiple of 8, for a part of a tensor
  int32_t models;
  int32_t inputs;
  int32_t settings;
  int32_t group;
};

struct View {
  uint64_t address;  // of the first element, not necessarily aligned to it
  uint64_t dtype;
};

struct Part {
  float weight;
  float rescale;
  float magnitude;   // ABOVE, BAND: |d| > magnitude stays, and == magnitude below ties_end; CLIP: the largest |d|
  float mass;        // what this model adds to the divisor when it agrees
  int64_t ties_end;  // ABOVE, BAND
  uint64_t cut;      // BERNOULLI: 0 ... 2^32
  uint64_t key;      // BERNOULLI
  int64_t top_ties_end;
  float top_magnitude;  // BAND: of these |d| > top_magnitude goes, and == top_magnitude below top_ties_end
  float padding;
};

struct Sweep {
  uint8_t keep;
  uint8_t elect;
  uint8_t tie_vote;
  uint8_t mean;
  float divisor;
  float lambda;
  float padding;
};

struct Target {
  int64_t offset;  // in bytes in the file, or an address where file is -1
  int32_t file;
  uint32_t dtype;
};

// What a selection finds of one model: > magnitude is kept, and == magnitude below ties_end.
struct Cut {
  float magnitude;
  int64_t ties_end;
};

// One tensor: `models` views, then the base's where deltas are taken.
struct Tensor {
  const View* views;
  int64_t elements;
  int32_t models;
  int32_t inputs;  // models, plus one where there is a base
  int64_t begin;   // flat index of the first element
};

namespace {  // internal linkage, see dtype.h

FASTMERGE_INLINE const View* base_of(const Tensor& tensor) {
  return tensor.inputs > tensor.models ? tensor.views + tensor.models : nullptr;
}

FASTMERGE_INLINE DType dtype_of(const View& view) {
  return static_cast<DType>(view.dtype);
}

FASTMERGE_INLINE const char* bytes_of(const View& view, int64_t element) {
  return reinterpret_cast<const char*>(view.address) + element * size_of(dtype_of(view));
}

FASTMERGE_INLINE int64_t bytes_read(const Tensor& tensor, int64_t elements) {
  int64_t bytes = 0;
  for (int input = 0; input < tensor.inputs; ++input) bytes += elements * size_of(dtype_of(tensor.views[input]));
  return bytes;
}

}  // namespace
}  // namespace fastmerge
