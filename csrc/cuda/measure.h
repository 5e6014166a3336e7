// Sums over the elements of many tensors: in float64, by grains of a fixed size and then in the order of the grains, so
// that their bits do not depend on the grid.
//
// Bytes read per element: those of its inputs, once for up to four models. Products of float32 are exact in float64, so
// a fused multiply-add rounds once either way. float64 is scarce on the smaller cards: one conversion per delta, one
// operation per product.
#pragma once
#include "../random.h"
#include "device.h"

namespace fastmerge {
namespace {

constexpr int MEASURE_THREADS = 256;
constexpr int GRAIN = 16 * MEASURE_THREADS * EIGHT;
constexpr int TOGETHER = 4;  // models that `gram` reads at once
constexpr int THREE = 3;     // and `norms`, whose sums take more registers
constexpr int NORMS = 6;     // of a model: L1, the square of L2, Linf; before `keep`, then after it
constexpr int MOST_SUMS = TOGETHER * (TOGETHER + 1) / 2;  // that a block adds up at once
constexpr size_t MEASURE_SHARED = MOST_SUMS * MEASURE_THREADS / WARP * sizeof(double);
static_assert(NORMS <= MOST_SUMS);

// One tensor: places in the tables, and what to keep.
struct Measured {
  int64_t elements, begin;
  int64_t grain, view, part, sum, out;  // its first; `sum` in the grains' sums, `out` in the tensors'
  int32_t models, inputs;
  Keep keep;
};

struct Measures {
  const Measured* tensors;
  int count;
  int64_t grains;
  const View* views;
  const Part* parts;
  double* sums;  // [grains, width]
  double* out;   // [tensors, width]
};

struct Gram {
  static __device__ int width(const Measured& tensor) { return tensor.models * tensor.models; }
  static __device__ bool is_largest(int) { return false; }
};

struct Norms {
  static __device__ int width(const Measured& tensor) { return tensor.models * NORMS; }
  static __device__ bool is_largest(int sum) { return sum % 3 == 2; }
};

// Which models a block reads at once.
struct Few {
  int model[TOGETHER];
  int count;
};

// Finite deltas of eight elements from `at` of some models; others count as 0, and so does what lies past the end.
template <int count>
__device__ __forceinline__ void finite8(const Measured& tensor, const View* views, const Few& few, int64_t at,
                                        float (&deltas)[count][EIGHT]) {
  Raw8 raw[count];
  float base[EIGHT] = {};
#pragma unroll
  for (int i = 0; i < count; ++i) raw[i] = raw8(views[few.model[i]], at, tensor.elements);
  if (tensor.inputs > tensor.models) load8(views[tensor.models], at, tensor.elements, base);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    widen8(raw[i], dtype_of(views[few.model[i]]), deltas[i]);
#pragma unroll
    for (int e = 0; e < EIGHT; ++e) {
      const float delta = deltas[i][e] - base[e];
      deltas[i][e] = fabsf(delta) < from_bits(INFINITE) ? delta : 0.0f;
    }
  }
}

// Adds up over the block: `write(i, sum)` is called once for each of the values, by some thread.
template <int count, class IsLargest, class Write>
__device__ __forceinline__ void add_up(double (&values)[count], const IsLargest& is_largest, const Write& write) {
  auto* shared = reinterpret_cast<double*>(shared_memory());
  constexpr int warps = MEASURE_THREADS / WARP;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const double here = is_largest(i) ? warp_max(values[i]) : warp_sum(values[i]);
    if (threadIdx.x % WARP == 0) shared[i * warps + threadIdx.x / WARP] = here;
  }
  sync_block();
  for (int i = threadIdx.x; i < count; i += MEASURE_THREADS) {
    double sum = shared[i * warps];
    for (int warp = 1; warp < warps; ++warp) {
      const double here = shared[i * warps + warp];
      sum = is_largest(i) ? (here > sum ? here : sum) : sum + here;
    }
    write(i, sum);
  }
  sync_block();
}

// --- gram ---

// Inner products of some models over a grain; `wanted(i, j)` are written.
template <int count, class Wanted>
__device__ void products(const Measured& tensor, const View* views, const Few& few, int64_t from, int64_t to,
                         double* sums, const Wanted& wanted) {
  double pairs[count * (count + 1) / 2] = {};
  for (int64_t at = from + threadIdx.x * EIGHT; at < to; at += MEASURE_THREADS * EIGHT) {
    float deltas[count][EIGHT];
    finite8<count>(tensor, views, few, at, deltas);
#pragma unroll
    for (int e = 0; e < EIGHT; ++e) {
      double wide[count];
#pragma unroll
      for (int i = 0; i < count; ++i) wide[i] = deltas[i][e];
#pragma unroll
      for (int j = 0; j < count; ++j) {
#pragma unroll
        for (int i = 0; i <= j; ++i) pairs[j * (j + 1) / 2 + i] = fma(wide[i], wide[j], pairs[j * (j + 1) / 2 + i]);
      }
    }
  }
  add_up(pairs, Gram::is_largest, [&](int pair, double sum) {
    int j = 0;
    while ((j + 1) * (j + 2) / 2 <= pair) ++j;
    const int i = pair - j * (j + 1) / 2;
    if (wanted(i, j)) sums[few.model[i] * tensor.models + few.model[j]] = sum;
  });
}

template <class Wanted>
__device__ __forceinline__ void products(const Measured& tensor, const View* views, const Few& few, int64_t from,
                                         int64_t to, double* sums, const Wanted& wanted) {
  switch (few.count) {
    case 1: return products<1>(tensor, views, few, from, to, sums, wanted);
    case 2: return products<2>(tensor, views, few, from, to, sums, wanted);
    case 3: return products<3>(tensor, views, few, from, to, sums, wanted);
    default: return products<4>(tensor, views, few, from, to, sums, wanted);
  }
}

// More than four models are taken as pairs of two, each pair with each other, so that all meet; a product within a pair
// is written where the pair first meets another.
__device__ inline void measure(Gram, const Measured& tensor, const View* views, const Part*, int64_t from, int64_t to,
                               double* sums) {
  if (tensor.models <= TOGETHER) {
    const Few all = {{0, 1, 2, 3}, tensor.models};
    return products(tensor, views, all, from, to, sums, [](int, int) { return true; });
  }
  const int pairs = (tensor.models + 1) / 2;
  for (int first = 0; first < pairs; ++first) {
    for (int second = first + 1; second < pairs; ++second) {
      const int rest = tensor.models - 2 * second;
      const Few few = {{2 * first, 2 * first + 1, 2 * second, 2 * second + 1}, rest >= 2 ? 4 : 3};
      products(tensor, views, few, from, to, sums, [&](int i, int j) {
        const bool across = i < 2 && j >= 2;
        return across || (first == 0 && (j >= 2 || second == 1));
      });
    }
  }
}

// --- norms ---

// Which of eight elements are above a magnitude, or equal to it among the first `ties`, as bits.
__device__ __forceinline__ uint32_t above8(const float (&deltas)[EIGHT], float magnitude, int64_t ties) {
  uint32_t above = 0;
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) {
    const float delta = fabsf(deltas[e]);
    above |= static_cast<uint32_t>(delta > fabsf(magnitude) || (delta == fabsf(magnitude) && e < ties)) << e;
  }
  return above;
}

// Which of eight elements stay, as bits; `index` is the flat index of the first.
template <Keep keep>
__device__ __forceinline__ uint32_t kept8(const Part& part, const float (&deltas)[EIGHT], int64_t index) {
  uint32_t kept = 0;
  if constexpr (keep == Keep::ABOVE || keep == Keep::BAND) {
    kept = above8(deltas, part.magnitude, part.ties_end - index);
    if (keep == Keep::BAND) kept &= ~above8(deltas, part.top_magnitude, part.top_ties_end - index);
  } else {
    const auto upper = static_cast<uint32_t>(part.cut >> 16);
    const Words words = philox(static_cast<uint64_t>(index) / EIGHT, 0, part.key);
    uint32_t equal = 0;
#pragma unroll
    for (int e = 0; e < EIGHT; ++e) {
      const uint32_t piece = piece_of(words, e);
      kept |= static_cast<uint32_t>(piece < upper) << e;
      equal |= static_cast<uint32_t>(piece == upper) << e;
    }
    for (; equal != 0; equal &= equal - 1) {
      const int e = __ffs(static_cast<int>(equal)) - 1;
      kept |= static_cast<uint32_t>(kept_on_equal(index + e, part.key, part.cut)) << e;
    }
  }
  return kept;
}

template <Keep keep, int count>
__device__ void sizes(const Measured& tensor, const View* views, const Part* parts, const Few& few, int64_t from,
                      int64_t to, double* sums) {
  constexpr int stages = keep == Keep::ALL ? 1 : 2;
  double totals[count][NORMS] = {};
  float largest[count][2] = {};
  for (int64_t at = from + threadIdx.x * EIGHT; at < to; at += MEASURE_THREADS * EIGHT) {
    float deltas[count][EIGHT];
    finite8<count>(tensor, views, few, at, deltas);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      uint32_t kept = 0;
      if constexpr (stages == 2 && keep != Keep::CLIP)
        kept = kept8<keep>(parts[few.model[i]], deltas[i], tensor.begin + at);
#pragma unroll
      for (int e = 0; e < EIGHT; ++e) {
#pragma unroll
        for (int stage = 0; stage < stages; ++stage) {
          if (stage == 1 && keep != Keep::CLIP && !(kept >> e & 1)) continue;
          float magnitude = fabsf(deltas[i][e]);
          if (stage == 1 && keep == Keep::CLIP) magnitude = fminf(magnitude, parts[few.model[i]].magnitude);
          const double wide = magnitude;
          totals[i][3 * stage] += wide;
          totals[i][3 * stage + 1] = fma(wide, wide, totals[i][3 * stage + 1]);
          largest[i][stage] = fmaxf(largest[i][stage], magnitude);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int stage = 0; stage < 2; ++stage) {
      const int from_stage = stage < stages ? stage : 0;
      totals[i][3 * stage] = totals[i][3 * from_stage];
      totals[i][3 * stage + 1] = totals[i][3 * from_stage + 1];
      totals[i][3 * stage + 2] = largest[i][from_stage];
    }
    add_up(totals[i], Norms::is_largest, [&](int sum, double value) { sums[few.model[i] * NORMS + sum] = value; });
  }
}

template <Keep keep>
__device__ __forceinline__ void sizes(const Measured& tensor, const View* views, const Part* parts, int64_t from,
                                      int64_t to, double* sums) {
  for (int model = 0; model < tensor.models; model += THREE) {
    const int rest = tensor.models - model;
    const Few few = {{model, model + 1, model + 2}, rest < THREE ? rest : THREE};
    switch (few.count) {
      case 1: sizes<keep, 1>(tensor, views, parts, few, from, to, sums); break;
      case 2: sizes<keep, 2>(tensor, views, parts, few, from, to, sums); break;
      default: sizes<keep, 3>(tensor, views, parts, few, from, to, sums);
    }
  }
}

__device__ inline void measure(Norms, const Measured& tensor, const View* views, const Part* parts, int64_t from,
                               int64_t to, double* sums) {
  switch (tensor.keep) {
    case Keep::ALL: return sizes<Keep::ALL>(tensor, views, parts, from, to, sums);
    case Keep::ABOVE: return sizes<Keep::ABOVE>(tensor, views, parts, from, to, sums);
    case Keep::BERNOULLI: return sizes<Keep::BERNOULLI>(tensor, views, parts, from, to, sums);
    case Keep::BAND: return sizes<Keep::BAND>(tensor, views, parts, from, to, sums);
    case Keep::CLIP: return sizes<Keep::CLIP>(tensor, views, parts, from, to, sums);
  }
}

}  // namespace
}  // namespace fastmerge
