// What one instruction set offers: the loops over a chunk of one tensor. Kernels own no threads and no memory.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../sweep.h"
#include "lowrank.h"

namespace fastmerge {

// Elements per chunk: small enough that its inputs, widened to float32, stay in the first cache. Chunks start at
// multiples of CHUNK in their tensor, whatever the tile, so that the random counters and the order of sums never
// change.
constexpr int CHUNK = 2048;
// Lanes of a sum: each float64 sum runs over 16 interleaved lanes on every instruction set, so that its bits are the
// same.
constexpr int SUM_LANES = 16;
// The most elements that any instruction set takes at once.
constexpr int LINE = 32;
constexpr int BINS = 2048;
constexpr int CANDIDATES = 4;

// A worker's memory for tensors of at most so many inputs, laid out in one block.
struct Scratch {
  const char** inputs;   // one pointer per input
  float* wide;           // inputs x CHUNK
  float* out;            // CHUNK
  uint32_t* thresholds;  // inputs x LINE
  float* tops;           // inputs x LINE
  uint8_t* kept;         // inputs x CHUNK / 8
  uint32_t* counts;      // inputs x 2

  static size_t bytes(int inputs) {
    return static_cast<size_t>(inputs) * (sizeof(char*) + CHUNK * sizeof(float) + LINE * 8 + CHUNK / 8 + 8) +
           CHUNK * sizeof(float) + 7 * 64;
  }
  Scratch(char* block, int inputs) {
    const auto take = [&block](size_t bytes) {
      char* start = block;
      block += (bytes + 63) / 64 * 64;
      return start;
    };
    const size_t n = static_cast<size_t>(inputs);
    wide = reinterpret_cast<float*>(take(n * CHUNK * sizeof(float)));
    out = reinterpret_cast<float*>(take(CHUNK * sizeof(float)));
    thresholds = reinterpret_cast<uint32_t*>(take(n * LINE * 4));
    tops = reinterpret_cast<float*>(take(n * LINE * 4));
    kept = reinterpret_cast<uint8_t*>(take(n * CHUNK / 8));
    counts = reinterpret_cast<uint32_t*>(take(n * 8));
    this->inputs = reinterpret_cast<const char**>(take(n * sizeof(char*)));
  }
};

// Where the k-th largest magnitude of one model may lie, as bits: [low, high]; and what was counted there.
struct Census {
  uint32_t low;
  uint32_t high;
  int shift;  // a bin holds 2^shift magnitudes
  int64_t above;
  int64_t bins[BINS];
};

// Magnitudes, as bits, one of which is probably the k-th largest; and how many lie above each and are equal to it.
struct Tally {
  int values;
  uint32_t value[CANDIDATES];
  int64_t above[CANDIDATES];
  int64_t equal[CANDIDATES];
};

// The k-th largest of some magnitudes, how many are above it and how many equal it.
struct Kth {
  uint32_t magnitude;
  int64_t above;
  int64_t equal;
};

// Where one of several settings that differ in lambda alone is written.
struct Output {
  float lambda;
  char* to;
  bool past_caches;  // nobody reads it soon, and it starts a line
};

struct Kernels {
  const char* name;

  // One sweep over `count` elements from `begin` (a multiple of CHUNK) into each of the outputs, whose lambda goes
  // before the sweep's. Returns the largest magnitude, as bits, among the outputs and those deltas that might not reach
  // them: below 0x7f800000 where all is finite. `counts` (with Keep::ABOVE, or nullptr): [models][2], how many elements
  // of each model are kept and how many equal its magnitude, right where all is finite. `again` tells that
  // the same elements were just swept, and are in the cache.
  uint32_t (*merge)(const Tensor&, const Sweep&, const Part*, int64_t begin, int count, DType out_dtype,
                    const Output* outputs, int settings, bool again, uint16_t* counts, Scratch&);

  // Deltas (weights without a base) as float32 into scratch.wide[model][count], padded with zeros to 16. A NaN becomes
  // 0 there, and so does Inf unless `infinite_too`: one bad element must not decide about the others.
  void (*deltas)(const Tensor&, int64_t begin, int count, bool infinite_too, Scratch&);
  // Adds to models x models sums, the upper triangle; what is not finite counts as 0.
  void (*gram)(const Tensor&, int64_t begin, int count, Scratch&, double* sums);
  // The measures below read what `deltas` left.
  void (*norms)(const Tensor&, const Sweep&, const Part*, int64_t begin, int count, Scratch&, double* sums);
  void (*census)(const float* deltas, int count, Census&);
  void (*tally)(const float* deltas, int count, Tally&);
  Kth (*kth)(const uint32_t* magnitudes, int64_t count, int64_t k);

  // Rows [begin, end) of the product.
  void (*lowrank)(const LowRank&, int64_t begin, int64_t end);
};

// The instruction sets of this build, best first, and why one cannot run here (nullptr: it can).
extern const Kernels* const KERNELS[];
extern const int KERNELS_COUNT;
const char* why_not(const Kernels& kernels);

}  // namespace fastmerge
