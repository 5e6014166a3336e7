// Sums over the elements of many tensors: in float64, by grains whose size follows from the tensor's alone and then in
// the order of the grains, so that their bits do not depend on the grid.
//
// Bytes read per element: those of its inputs, once for up to four models. Products of float32 are exact in float64, so
// a fused multiply-add rounds once either way. float64 is scarce on the smaller cards: one conversion per delta, one
// operation per product.
#pragma once
#include "deltas.h"
#include "drawn.h"

namespace fastmerge {
namespace {

constexpr int64_t LEAST_GRAIN = 8 * STEP;
constexpr int64_t MOST_GRAINS = 4096;  // of a tensor: one block adds them up
constexpr int NORMS = 6;               // of a model: L1, the square of L2, Linf; before `keep`, then after it
constexpr int MOST_SUMS = 3 * NORMS;   // that a block adds up at once

static_assert(TOGETHER * (TOGETHER + 1) / 2 <= MOST_SUMS);

// Read anew from shared memory at each use, as registers are scarcer than that: which grains are a block's ...
struct Share {
  volatile int first, end;
  volatile int tensor;  // the one it is at
};

// ... and what a random `keep` goes by.
struct Draws {
  volatile int64_t index;  // of the grain's first element
  volatile uint64_t key[3], cut[3];
};

// What a block keeps in shared memory.
struct Slate {
  double sums[MOST_SUMS][MEASURE_THREADS / WARP];
  Starts starts;
  Draws draws;
  Share share;
};
constexpr size_t MEASURE_SHARED = sizeof(Slate);

__device__ __forceinline__ Slate& slate() {
  return *reinterpret_cast<Slate*>(shared_memory());
}

FASTMERGE_INLINE int64_t grain_of(int64_t elements) {
  int64_t grain = LEAST_GRAIN;
  while ((elements + grain - 1) / grain > MOST_GRAINS) grain *= 2;
  return grain;
}

FASTMERGE_INLINE int64_t gram_width(int models) {
  return int64_t{models} * models;
}

FASTMERGE_INLINE int64_t norms_width(int models) {
  return int64_t{models} * NORMS;
}

// One tensor: places in the tables, and what to keep.
struct Measured {
  int64_t elements, begin, grain;  // elements of a grain
  int64_t view, part, sum, out;    // its first; `sum` in the grains' sums, `out` in the tensors'
  int32_t first, grains;           // grains: those of the tensors before, and its own
  int32_t models, inputs;
};

struct Measures {
  const Measured* tensors;
  int count;
  int grains;
  const View* views;
  const Part* parts;
  double* sums;  // of each tensor [width, grains]
  int* done;     // grains of each tensor
  double* out;   // [tensors, width]
};

// Where the sums of a grain go.
struct Place {
  double* first;
  int grains;

  __device__ void write(int sum, double value) const { first[int64_t{sum} * grains] = value; }
};

__device__ __forceinline__ double larger_of(double a, double b) {
  return a > b ? a : b;
}

// Adds up over the block: `write(i, sum)` is called once for each of the values, by some thread.
template <int count, class IsLargest, class Write>
__device__ __forceinline__ void add_up(const double (&values)[count], const IsLargest& is_largest, const Write& write) {
  static_assert(count <= MOST_SUMS);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const double here = is_largest(i) ? warp_max(values[i]) : warp_sum(values[i]);
    if (threadIdx.x % WARP == 0) slate().sums[i][threadIdx.x / WARP] = here;
  }
  sync_block();
  for (int i = threadIdx.x; i < count; i += MEASURE_THREADS) {
    const double (&each)[MEASURE_THREADS / WARP] = slate().sums[i];
    double sum = each[0];
#pragma unroll
    for (int warp = 1; warp < MEASURE_THREADS / WARP; ++warp) {
      sum = is_largest(i) ? larger_of(each[warp], sum) : sum + each[warp];
    }
    write(i, sum);
  }
  sync_block();
}

// --- gram ---

template <int count>
struct Products {
  static constexpr int PAIRS = count * (count + 1) / 2;
  double pairs[PAIRS];

  static constexpr __device__ int pair_of(int i, int j) { return j * (j + 1) / 2 + i; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (double& pair : pairs) pair = 0.0;
  }

  __device__ __forceinline__ void prepare(int) {}

  __device__ __forceinline__ void take(const float (&deltas)[count][EIGHT], int) {
#pragma unroll
    for (int e = 0; e < EIGHT; ++e) {
      double wide[count];
#pragma unroll
      for (int i = 0; i < count; ++i) wide[i] = deltas[i][e];
#pragma unroll
      for (int j = 0; j < count; ++j) {
#pragma unroll
        for (int i = 0; i <= j; ++i) pairs[pair_of(i, j)] = fma(wide[i], wide[j], pairs[pair_of(i, j)]);
      }
    }
  }

  // A product of two float32 is far from the largest float64.
  __device__ __forceinline__ bool is_finite() const {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < count; ++i) sum += pairs[pair_of(i, i)];
    return sum - sum == 0.0;
  }
};

// Inner products of some models over a grain; `wanted(i, j)` are written.
template <Layout layout, int count, class Wanted>
__device__ __forceinline__ void multiply(const Grain& grain, const Few& few, int models, const Place& place,
                                         const Wanted& wanted) {
  Products<count> products;
  take_deltas<layout, count>(grain, few, slate().starts, products);
  add_up(
      products.pairs, [](int) { return false; },
      [&](int pair, double sum) {
        int j = 0;
        while (Products<count>::pair_of(0, j + 1) <= pair) ++j;
        const int i = pair - Products<count>::pair_of(0, j);
        if (wanted(i, j)) place.write(few.at(i) * models + few.at(j), sum);
      });
}

template <Layout layout>
struct Gram {
  static constexpr int blocks = 2;  // per processor

  static __device__ int64_t width(int models) { return gram_width(models); }
  static __device__ bool is_wanted(int models, int sum) { return sum / models <= sum % models; }
  static __device__ bool is_largest(int) { return false; }

  // More than four models are taken as pairs of two, each pair with each other, so that all meet; a product within a
  // pair is written where the pair first meets another.
  static __device__ __forceinline__ void measure(const Measured& tensor, const Grain& grain, const Part*,
                                                 const Place& place) {
    const int models = tensor.models;
    const auto all = [](int, int) { return true; };
    switch (models) {
      case 1: return multiply<layout, 1>(grain, {{0}}, models, place, all);
      case 2: return multiply<layout, 2>(grain, {{0, 1}}, models, place, all);
      case 3: return multiply<layout, 3>(grain, {{0, 1, 2}}, models, place, all);
      case 4: return multiply<layout, 4>(grain, {{0, 1, 2, 3}}, models, place, all);
    }
    const int pairs = (models + 1) / 2;
    for (int first = 0; first < pairs; ++first) {
      for (int second = first + 1; second < pairs; ++second) {
        const auto wanted = [&](int i, int j) {
          const bool across = i < 2 && j >= 2;
          return across || (first == 0 && (j >= 2 || second == 1));
        };
        const Few few = {{2 * first, 2 * first + 1, 2 * second, 2 * second + 1}};
        if (2 * second + 1 < models) {
          multiply<layout, 4>(grain, few, models, place, wanted);
        } else {
          multiply<layout, 3>(grain, few, models, place, wanted);
        }
      }
    }
  }
};

// --- norms ---

__device__ __forceinline__ bool is_peak(int norm) {
  return norm % 3 == 2;
}

// Of one model, before or after `keep`.
struct Size {
  double l1, squares;
  float largest;

  __device__ __forceinline__ void add(double wide) {
    l1 += wide;
    squares = fma(wide, wide, squares);
  }
};

// Where ties end, seen from the first element of a grain, which has the flat index `index`.
__device__ __forceinline__ int end_of(int64_t ties_end, int64_t index) {
  const int64_t distance = ties_end - index, most = int64_t{1} << 30;
  return static_cast<int>(distance < 0 ? 0 : distance > most ? most : distance);
}

// What is kept of a model's deltas, as a grain needs it.
template <Keep keep>
struct Rule {
  __device__ __forceinline__ void learn(const Part&, int64_t) {}
};

template <>
struct Rule<Keep::ABOVE> {
  uint32_t magnitude;
  int end;  // of ties

  __device__ __forceinline__ void learn(const Part& part, int64_t index) {
    magnitude = to_bits(part.magnitude) & 0x7fffffff;
    end = end_of(part.ties_end, index);
  }
};

template <>
struct Rule<Keep::BAND> {
  uint32_t magnitude, top_magnitude;
  int end, top_end;

  __device__ __forceinline__ void learn(const Part& part, int64_t index) {
    magnitude = to_bits(part.magnitude) & 0x7fffffff;
    top_magnitude = to_bits(part.top_magnitude) & 0x7fffffff;
    end = end_of(part.ties_end, index);
    top_end = end_of(part.top_ties_end, index);
  }
};

template <>
struct Rule<Keep::CLIP> {
  float limit;

  __device__ __forceinline__ void learn(const Part& part, int64_t) { limit = part.magnitude; }
};

template <>
struct Rule<Keep::BERNOULLI> {
  uint32_t kept;  // of the eight elements at hand, by all models
  int shift;      // to the right, of this one's
};

// The sizes of eight elements, before and after what a rule keeps of them.
__device__ __forceinline__ void add8(const float (&deltas)[EIGHT], int, const Rule<Keep::ALL>&, Size (&sizes)[2]) {
#pragma unroll
  for (const float delta : deltas) {
    sizes[0].add(fabsf(delta));
    sizes[0].largest = fmaxf(sizes[0].largest, fabsf(delta));
  }
}

// In nearly all eights equals stay either all or not at all, so that one limit decides; where they do not, those that
// stay are added afterwards, which is exact: eight times a square of 48 bits is one of 51.
__device__ __forceinline__ void add8(const float (&deltas)[EIGHT], int offset, const Rule<Keep::ABOVE>& rule,
                                     Size (&sizes)[2]) {
  const int ties = rule.end - offset;
  const float limit = from_bits(rule.magnitude + (ties < EIGHT));
  float largest = 0.0f;
#pragma unroll
  for (const float delta : deltas) {
    const double wide = fabsf(delta);
    sizes[0].add(wide);
    if (fabsf(delta) >= limit) sizes[1].add(wide);
    largest = fmaxf(largest, fabsf(delta));
  }
  sizes[0].largest = fmaxf(sizes[0].largest, largest);
  if (largest >= limit) sizes[1].largest = fmaxf(sizes[1].largest, largest);
  if (ties <= 0 || ties >= EIGHT) return;
  const float equal = from_bits(rule.magnitude);
  int equals = 0;
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) equals += e < ties && fabsf(deltas[e]) == equal;
  const double wide = equal;
  if (equals > 0) {
    sizes[1].l1 += equals * wide;
    sizes[1].squares = fma(equals * wide, wide, sizes[1].squares);
    sizes[1].largest = fmaxf(sizes[1].largest, equal);
  }
}

template <class Kept>
__device__ __forceinline__ void add8_kept(const float (&deltas)[EIGHT], Size (&sizes)[2], const Kept& kept) {
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) {
    const float magnitude = fabsf(deltas[e]);
    const double wide = magnitude;
    sizes[0].add(wide);
    sizes[0].largest = fmaxf(sizes[0].largest, magnitude);
    if (!kept(e, magnitude)) continue;
    sizes[1].add(wide);
    sizes[1].largest = fmaxf(sizes[1].largest, magnitude);
  }
}

__device__ __forceinline__ void add8(const float (&deltas)[EIGHT], int offset, const Rule<Keep::BAND>& rule,
                                     Size (&sizes)[2]) {
  const int ties = rule.end - offset, top_ties = rule.top_end - offset;
  add8_kept(deltas, sizes, [&](int e, float magnitude) {
    return magnitude >= from_bits(rule.magnitude + (e >= ties)) &&
           !(magnitude >= from_bits(rule.top_magnitude + (e >= top_ties)));
  });
}

__device__ __forceinline__ void add8(const float (&deltas)[EIGHT], int, const Rule<Keep::CLIP>& rule,
                                     Size (&sizes)[2]) {
#pragma unroll
  for (const float delta : deltas) {
    const float clipped = fminf(fabsf(delta), rule.limit);
    sizes[0].add(fabsf(delta));
    sizes[1].add(clipped);
    sizes[0].largest = fmaxf(sizes[0].largest, fabsf(delta));
    sizes[1].largest = fmaxf(sizes[1].largest, clipped);
  }
}

__device__ __forceinline__ void add8(const float (&deltas)[EIGHT], int, const Rule<Keep::BERNOULLI>& rule,
                                     Size (&sizes)[2]) {
  add8_kept(deltas, sizes, [&](int e, float) { return (rule.kept >> (kept_bit(e) - rule.shift) & 1) != 0; });
}

template <Keep keep, int count>
struct Sizes {
  Rule<keep> rules[count];
  Size sizes[count][2];

  // `index` is that of the grain's first element.
  __device__ __forceinline__ Sizes(const Part* parts, int64_t index) {
    if constexpr (keep == Keep::BERNOULLI) {
      Draws& draws = slate().draws;
      if (threadIdx.x == 0) draws.index = index;
      if (threadIdx.x < count) {
        draws.key[threadIdx.x] = parts[threadIdx.x].key;
        draws.cut[threadIdx.x] = parts[threadIdx.x].cut;
      }
      sync_block();
    } else {
#pragma unroll
      for (int i = 0; i < count; ++i) rules[i].learn(parts[i], index);
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& size : sizes) size[0] = size[1] = {0.0, 0.0, 0.0f};
  }

  // Draws one model after the other, as all at once would take too many registers, while loads are on their way.
  __device__ __forceinline__ void prepare(int offset) {
    if constexpr (keep == Keep::BERNOULLI) {
      const Draws& draws = slate().draws;
      uint32_t kept = 0;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        kept |= drawn(draws.key[i], draws.cut[i], draws.index + offset) >> (KEPT_BITS * i);
      }
#pragma unroll
      for (int i = 0; i < count; ++i) rules[i] = {kept, KEPT_BITS * i};
    }
  }

  __device__ __forceinline__ void take(const float (&deltas)[count][EIGHT], int offset) {
#pragma unroll
    for (int i = 0; i < count; ++i) add8(deltas[i], offset, rules[i], sizes[i]);
  }

  __device__ __forceinline__ bool is_finite() const {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < count; ++i) sum += sizes[i][0].l1;
    return sum - sum == 0.0;
  }
};

template <Keep keep, Layout layout, int count>
__device__ __forceinline__ void size_up(const Grain& grain, int first, const Part* parts, int64_t begin,
                                        const Place& place) {
  Sizes<keep, count> taken(parts + first, begin + grain.from);
  take_deltas<layout, count>(grain, {{first, first + 1, first + 2}}, slate().starts, taken);
  double totals[count * NORMS];
#pragma unroll
  for (int i = 0; i < count * 2; ++i) {
    const Size& size = taken.sizes[i / 2][keep == Keep::ALL ? 0 : i % 2];
    totals[3 * i] = size.l1;
    totals[3 * i + 1] = size.squares;
    totals[3 * i + 2] = size.largest;
  }
  add_up(totals, is_peak, [&](int sum, double value) { place.write(first * NORMS + sum, value); });
}

template <Keep keep, Layout layout>
struct Norms {
  static constexpr int blocks = 2;

  static __device__ int64_t width(int models) { return norms_width(models); }
  static __device__ bool is_wanted(int, int) { return true; }
  static __device__ bool is_largest(int sum) { return is_peak(sum); }

  static __device__ __forceinline__ void measure(const Measured& tensor, const Grain& grain, const Part* parts,
                                                 const Place& place) {
    constexpr int most = keep == Keep::BAND ? 2 : 3;  // more at once would spill registers
    for (int model = 0; model < tensor.models; model += most) {
      switch (tensor.models - model) {
        case 1: size_up<keep, layout, 1>(grain, model, parts, tensor.begin, place); break;
        case 2: size_up<keep, layout, 2>(grain, model, parts, tensor.begin, place); break;
        default: size_up<keep, layout, most>(grain, model, parts, tensor.begin, place);
      }
    }
  }
};

}  // namespace
}  // namespace fastmerge
