// The sweep of a tensor by the threads of a block, eight elements each: what `merge` and `merge_ranked` are made of.
//
// Reads 2 or 4 bytes per element and input (once from memory: further settings find them in the cache), and writes as
// many per output. Not yet measured on a card.
#pragma once
#include "ops.h"
#include "plain.h"

namespace fastmerge {
namespace {

using Count = unsigned long long;  // what the card's atomics count in

// One tensor and its settings of one combination of stages, as the sweep finds it in memory: it takes what it needs
// when it needs it. Places are byte offsets in the table that the item lies in.
struct Item {
  int64_t elements;
  int64_t begin;       // flat index of the first element
  int64_t first_tile;  // of the launch
  int64_t views;
  int64_t sweeps;
  int64_t parts;
  int64_t targets;
  int64_t nonfinite;  // per input; 0: not to be counted
  int64_t first;
  int64_t overflow;  // per setting; 0: not to be counted
  int32_t models;
  int32_t inputs;
  int32_t settings;
  int32_t plain;  // 1: what plain.h sweeps
};

template <class T>
__device__ __forceinline__ T* at_place(const char* table, int64_t place) {
  return reinterpret_cast<T*>(const_cast<char*>(table) + place);
}

// The smallest magnitude that rounds to Inf.
__device__ __forceinline__ uint32_t overflow_bits(DType dtype) {
  return dtype == DType::F32 ? INFINITE : dtype == DType::F16 ? 0x477ff000 : 0x7f7f8000;
}

// How many of the eight elements from `flat` lie below an end.
__device__ __forceinline__ int below(int64_t end, int64_t flat) {
  const int64_t ties = end - flat;
  return ties <= 0 ? 0 : ties >= EIGHT ? EIGHT : static_cast<int>(ties);
}

// |d| > T stays, and == T below the end of ties; NaN stays. `ties`: of the eight, how many lie below that end.
__device__ __forceinline__ void keep_above(float (&delta)[EIGHT], float magnitude, int ties) {
  const uint32_t threshold = to_bits(magnitude), limit = ties > 0 ? threshold : threshold + 1;
  if (limit <= INFINITE && (ties <= 0 || ties >= EIGHT)) {
    for (float& d : delta) d = fabsf(d) < from_bits(limit) ? 0.0f : d;
    return;
  }
  for (int i = 0; i < EIGHT; ++i) {
    const uint32_t here = i < ties ? threshold : threshold + 1;
    delta[i] = (to_bits(delta[i]) & 0x7fffffff) >= here ? delta[i] : 0.0f;
  }
}

// |d| > T goes, and == T below the end of ties; NaN stays. `ties` as above.
__device__ __forceinline__ void drop_above(float (&delta)[EIGHT], float magnitude, int ties) {
  for (int i = 0; i < EIGHT; ++i) {
    const float least = from_bits(to_bits(magnitude) + (i >= ties));
    delta[i] = fabsf(delta[i]) >= least ? 0.0f : delta[i];
  }
}

// What is rare is looked for again, in the eight where the sweep saw that something is there.
__device__ inline void look(const char* table, const Item& item, int setting, int64_t at, const float (&out)[EIGHT],
                            DType dtype) {
#pragma unroll 1
  for (int input = 0; item.nonfinite && setting == 0 && input < item.inputs; ++input) {
    float values[EIGHT];
    load8(at_place<View>(table, item.views)[input], at, item.elements, values);
    unsigned places = 0;
    for (int i = 0; i < EIGHT; ++i) places |= unsigned{(to_bits(values[i]) & INFINITE) == INFINITE} << i;
    if (!places) continue;
    atomicAdd(at_place<Count>(table, item.nonfinite) + input, static_cast<Count>(__popc(places)));
    atomicMin(at_place<Count>(table, item.first) + input,
              static_cast<Count>(item.begin + at + __ffs(static_cast<int>(places)) - 1));
  }
  const uint32_t limit = overflow_bits(dtype);
  Count overflow = 0;
  for (int i = 0; i < EIGHT; ++i) {
    const uint32_t magnitude = to_bits(out[i]) & 0x7fffffff;
    overflow += magnitude >= limit && magnitude < INFINITE && at + i < item.elements;
  }
  if (item.overflow && overflow) atomicAdd(at_place<Count>(table, item.overflow) + setting, overflow);
}

template <Keep keep, Elect elect, Mass by>
struct Sweeping {
  using L = Lanes;
  // A NaN or Inf that is dropped or outvoted never reaches the output: then the deltas are looked at themselves.
  static constexpr bool may_hide = keep != Keep::ALL || elect == Elect::PLAIN || elect == Elect::COUNT;

  // Random numbers beside two more sums per element take more than 128 registers.
  static constexpr int blocks = keep == Keep::BERNOULLI && elect != Elect::NONE ? 3 : 4;  // per processor
  // Models whose elements are asked for before the first is used: what fits into the registers on every card.
  static constexpr int together = elect != Elect::NONE && by != Mass::DIVISOR ? 2 : 3;

  Ballot<L> ballots[EIGHT];
  float worst;

  __device__ __forceinline__ void start() {
    for (Ballot<L>& ballot : ballots) {
      ballot = Ballot<L>();
      if (elect == Elect::NONE) ballot.sum = -0.0f;  // the one number that leaves the first term as it is
    }
    worst = 0.0f;
  }

  // Leaves in `delta` what is kept of it; `kept` has what was drawn.
  __device__ __forceinline__ void add(float (&delta)[EIGHT], const Part& part, const Cut* cut, int64_t flat,
                                      uint32_t kept) {
    if constexpr (may_hide) {
      for (const float d : delta) worst = L::larger(worst, d);
    }
    if constexpr (keep == Keep::ABOVE || keep == Keep::BAND) {
      const float magnitude = cut ? cut->magnitude : part.magnitude;
      keep_above(delta, magnitude, below(cut ? cut->ties_end : part.ties_end, flat));
      if (keep == Keep::BAND) drop_above(delta, part.top_magnitude, below(part.top_ties_end, flat));
    } else if constexpr (keep == Keep::CLIP) {
      const float limit = cut ? cut->magnitude : part.magnitude;
      for (float& d : delta) d = d > limit ? limit : d < -limit ? -limit : d;
    } else if constexpr (keep == Keep::BERNOULLI) {
      for (int i = 0; i < EIGHT; ++i) delta[i] = kept >> kept_bit(i) & 1 ? delta[i] : 0.0f;
    }
    if (part.rescale != 1.0f) {
      for (float& d : delta) d = d * part.rescale;
    }
    for (int i = 0; i < EIGHT; ++i) {
      const float weighted = delta[i] * part.weight;
      if constexpr (elect == Elect::NONE) {
        ballots[i].sum = ballots[i].sum + weighted;
        if (by == Mass::CONTRIBUTORS) ballots[i].mass_positive = contributors<L>(ballots[i].mass_positive, weighted);
      } else {
        vote<L, elect, by>(ballots[i], delta[i], weighted, part.mass);
      }
    }
  }

  __device__ __forceinline__ void finish(const Sweep& sweep, const float (&base)[EIGHT], bool has_base,
                                         float (&out)[EIGHT]) {
    const float divisor = sweep.divisor == 0.0f ? 1.0f : sweep.divisor;
    const float least = sweep.tie_vote == static_cast<uint8_t>(TieVote::ZERO) ? from_bits(1) : 0.0f;
    float mass[EIGHT];
    for (int i = 0; i < EIGHT; ++i) {
      mass[i] = divisor;
      out[i] = ballots[i].sum;
      if constexpr (elect != Elect::NONE) {
        out[i] = elected<L, by>(ballots[i], least, mass[i]);
      } else if constexpr (by == Mass::CONTRIBUTORS) {
        mass[i] = one_if_zero<L>(ballots[i].mass_positive);
      }
    }
    if (by != Mass::DIVISOR || divisor != 1.0f) {
      for (int i = 0; i < EIGHT; ++i) out[i] = divided(out[i], mass[i]);
    }
    for (int i = 0; i < EIGHT; ++i) {
      const float merged = out[i] * sweep.lambda;
      out[i] = has_base ? combine<L, true>(base[i], merged) : merged;
      worst = L::larger(worst, out[i]);
    }
  }
};

// Eight elements of a tensor, for each of its settings.
template <Keep keep, Elect elect, Mass by>
__device__ __forceinline__ void sweep_eight(const char* table, const Item& item, const Cut* cuts, int64_t at) {
  constexpr int TOGETHER = Sweeping<keep, elect, by>::together;
  const int models = item.models;
  const bool has_base = item.inputs > models;
  const View* views = at_place<View>(table, item.views);
#pragma unroll 1
  for (int setting = 0; setting < item.settings; ++setting) {  // after the first, the inputs come from the cache
    const Part* parts = at_place<Part>(table, item.parts) + setting * models;
    const Raw8 raw = has_base ? raw8(views[models], at, item.elements) : Raw8{};
    float base[EIGHT];
    Sweeping<keep, elect, by> sweeping;
    sweeping.start();
#pragma unroll 1
    for (int group = 0; group < models; group += TOGETHER) {
      uint32_t kept = 0;  // of each model, drawn before the loads: both at once take too many registers
      if constexpr (keep == Keep::BERNOULLI) {
#pragma unroll 1
        for (int m = 0; m < TOGETHER && group + m < models; ++m) {
          const Part& part = parts[group + m];
          kept |= drawn(part.key, part.cut, item.begin + at) >> (KEPT_BITS * m);
        }
      }
      Raw8 raws[TOGETHER] = {};  // else what is not read counts as alive all through the kernel
#pragma unroll
      for (int m = 0; m < TOGETHER; ++m) {
        if (group + m < models) raws[m] = raw8(views[group + m], at, item.elements);
      }
      if (group == 0) widen8(raw, has_base ? dtype_of(views[models]) : DType::F32, base);
#pragma unroll
      for (int m = 0; m < TOGETHER; ++m) {
        if (group + m >= models) continue;
        float delta[EIGHT];
        widen8(raws[m], dtype_of(views[group + m]), delta);
        for (int i = 0; i < EIGHT; ++i) delta[i] = delta[i] - base[i];
        sweeping.add(delta, parts[group + m], cuts ? cuts + group + m : nullptr, item.begin + at,
                     kept << (KEPT_BITS * m));
      }
    }
    float out[EIGHT];
    sweeping.finish(at_place<Sweep>(table, item.sweeps)[setting], base, has_base, out);
    const Target& target = at_place<Target>(table, item.targets)[setting];
    const auto dtype = static_cast<DType>(target.dtype);
    Raw8 narrow = narrow8(out, dtype);
    if ((to_bits(sweeping.worst) & 0x7fffffff) >= overflow_bits(dtype)) {
      look(table, item, setting, at, out, dtype);
      narrow = quiet8(narrow, dtype);
    }
    store8(narrow, {static_cast<uint64_t>(target.offset), target.dtype}, at, item.elements);
  }
}

// A plain item's part of the work from a tile on: fills `in` in, and returns where the run of tiles ends that are whole
// and have, of each model, no end of ties in them. That is `tile` where there is no such run.
template <Keep keep, Elect elect, int THREADS>
__device__ __forceinline__ int64_t run_of(const char* table, const Item& item, const Cut* cuts, int64_t tile,
                                          int64_t to, Plain& in) {
  constexpr int64_t TILE = THREADS * EIGHT;
  const View* views = at_place<View>(table, item.views);
  const Sweep& sweep = *at_place<Sweep>(table, item.sweeps);
  in.parts = at_place<Part>(table, item.parts);
  in.base = reinterpret_cast<const uint4*>(views[item.inputs - 1].address);
  in.target = reinterpret_cast<uint4*>(at_place<Target>(table, item.targets)->offset);
  in.count = item.models;
  in.divisor = sweep.divisor;
  in.lambda = sweep.lambda;
  int64_t until = lesser(to, item.elements / TILE);
#pragma unroll
  for (int m = 0; m < PLAIN_MODELS; ++m) {
    in.weights[m] = -0.0f;
    in.masses[m] = in.limits[m] = in.magnitudes[m] = 0.0f;
    if (m >= item.models) continue;
    const Part& part = in.parts[m];
    in.models[m] = reinterpret_cast<const uint4*>(views[m].address);
    in.weights[m] = part.weight;
    in.masses[m] = elect == Elect::NONE ? 1.0f : part.mass;
    if (keep != Keep::ABOVE) continue;
    const int64_t ties = (cuts ? cuts[m].ties_end : part.ties_end) - item.begin;
    const int64_t whole = ties < 0 ? 0 : ties / TILE;  // tiles that lie below the end of ties
    const bool below = tile < whole;
    if (below || (tile == whole && ties > tile * TILE)) until = lesser(until, whole);
    in.magnitudes[m] = cuts ? cuts[m].magnitude : part.magnitude;
    const uint32_t limit = to_bits(in.magnitudes[m]) + !below;
    in.limits[m] = from_bits(limit < INFINITE ? limit : INFINITE);  // an Inf is odd anyway
  }
  return until < tile ? tile : until;
}

// The tiles `from` ... `to` - 1 of a tensor, by the `THREADS` threads of a block; a tile is eight elements for each of
// them. Threads do not wait for one another. `cuts`, one per model, are in place of the parts' own; or there are none.
template <Keep keep, Elect elect, Mass by, int THREADS>
__device__ __forceinline__ void sweep_any(const char* table, const Item& item, const Cut* cuts, int64_t from,
                                          int64_t to) {
#pragma unroll 1
  for (int64_t tile = from; tile < to; ++tile) {
    const int64_t at = (tile * THREADS + threadIdx.x) * EIGHT;
    if (at >= item.elements) return;
    sweep_eight<keep, elect, by>(table, item, cuts, at);
  }
}

// The same, the shorter way where there is one, with plain_shared() bytes of shared memory.
template <Keep keep, Elect elect, Mass by, int THREADS>
__device__ __forceinline__ void sweep_tiles(const char* table, const Item& item, const Cut* cuts, int64_t from,
                                            int64_t to) {
  if constexpr (!has_plain<keep, elect, by>) {
    sweep_any<keep, elect, by, THREADS>(table, item, cuts, from, to);
  } else {
#pragma unroll 1
    for (int64_t tile = from, until; tile < to; tile = until) {
      until = to;
      if (item.plain) {
        Plain in;
        const int64_t end = run_of<keep, elect, THREADS>(table, item, cuts, tile, to, in);
        if (item.inputs > item.models) {
          tile = plain_tiles<keep, elect, by, true, THREADS>(in, item.begin, tile, end);
        } else if constexpr (keep == Keep::ALL) {
          tile = plain_tiles<keep, elect, by, false, THREADS>(in, item.begin, tile, end);
        }
        until = lesser(to, tile + 1);
      }
      sweep_any<keep, elect, by, THREADS>(table, item, cuts, tile, until);
    }
  }
}

}  // namespace
}  // namespace fastmerge
