// A tensor's cuts as a guess: how it is made, counted after, proven, and what is swept again.
//
// Deltas of 16-bit weights are discrete, often a per cent or more of them of the k-th magnitude. So a guess at that
// magnitude can be right, and one at the end of its equals near. It is made by the bins of a few units, read early. A
// sweep with the guess counts what lies above its magnitude and what equals it, which proves the magnitude and tells
// the section where the equals end; the exact end is found there as after a selection. Between the guessed end and the
// true one lies what is swept again. Where the magnitude is another one, the counts say how far off it is.
#pragma once
#include "queue.h"
#include "sweeping.h"

namespace fastmerge {
namespace {

constexpr int64_t GUESSED_TILES = 4;  // per block of the grid, at least: below, a second read costs next to nothing
constexpr int GUESSED_MODELS = 1024;  // at most
constexpr int64_t TALLIED_UNITS = 4;  // before they are swept: what all blocks hold of them stays in the second cache
constexpr int RUN_UNITS = 8;          // that one block sweeps again at a time

// One model's guess is its search's magnitude, and an end of its equals.
struct Guess {
  int64_t ties_end;           // -1: there is none
  int64_t before, equal;      // early elements in the bins above the magnitude's, and in its own
  unsigned long long equals;  // of all elements
};

// What a block has counted of one model in its section.
struct Tally {
  uint32_t above, equal;
};

// --- the guess ---

// One unit in so many is read early. It is worth the more, the fewer elements there are: where one in 130 equals the
// k-th magnitude, an eighth of 2^24 elements tells the end of the equals to 3 % of the tensor, and so does a 32nd of
// 2^26.
__device__ inline int64_t early_period(int64_t elements) {
  return elements < 4096 * TILE ? 8 : elements < 32768 * TILE ? 16 : 32;
}

__device__ inline int64_t early_units(int64_t elements) {
  return elements / UNIT / early_period(elements);
}

// Each lies somewhere in its period, as the runs of the sample do.
__device__ inline void count_early(const Selection& in, const Few& few, int64_t from, int64_t to, Seen (&seen)[AT_ONCE],
                                   Slate& slate) {
  const int64_t period = early_period(in.elements);
  for (int64_t unit = from; unit < to; ++unit) {
    const uint64_t noise = (static_cast<uint64_t>(unit) + 1) * 0x9E3779B97F4A7C15 >> 32;
    const int64_t begin = (unit * period + static_cast<int64_t>(noise % static_cast<uint64_t>(period))) * UNIT;
    count_stretch(in, 0, begin, begin + UNIT, few, seen, slate);
  }
}

// So many of all elements, among the early ones.
__device__ inline int64_t early_share(const Selection& in, int64_t elements) {
  const double share = static_cast<double>(early_units(in.elements) * UNIT) / static_cast<double>(in.elements);
  return static_cast<int64_t>(floor(share * static_cast<double>(elements) + 0.5));
}

// Where a rank lies among the early elements, from the top, and how far that is off, as a sample's places are.
struct Place {
  int64_t at;
  double variance;
};

__device__ inline Place place_of_rank(const Selection& in, int64_t rank) {
  const double share = static_cast<double>(rank) / static_cast<double>(in.elements);
  const int64_t at = early_share(in, rank);
  return {at > 0 ? at : 1, share * (1.0 - share) * static_cast<double>(early_units(in.elements) * UNIT)};
}

// A guess by the rank's place in the bins; none where it lies outside, in a bin of several magnitudes, or in one that
// it may easily miss, as a guess that fails costs more than a selection. It ends with a unit, so that either all or
// none of a unit's equals are kept.
__device__ inline void guess_at(const Selection& in, int model, const Ledger& ledger, Guess& guess, const Place& place,
                                Slate& slate) {
  const auto from_the_top = [&](int64_t item) { return static_cast<int64_t>(ledger.bins[BINS - 1 - item].count); };
  const Reached reached = reach(BINS, place.at, slate, from_the_top);
  if (threadIdx.x != 0) return;
  ledger.search->above = 0;
  guess = {-1, 0, 0, 0};
  if (reached.item == BINS) return;
  const Bin bin = ledger.bins[BINS - 1 - reached.item];
  const auto equal = static_cast<int64_t>(bin.count);
  const auto width = static_cast<double>(equal);
  if (bin.value == MIXED || width * width < 4.0 * place.variance) return;  // two standard deviations
  const double kept = static_cast<double>(place.at - reached.before) / width;
  const auto units = static_cast<int64_t>(kept * static_cast<double>(in.elements) / UNIT + 0.5);
  ledger.search->magnitude = bin.value;
  guess = {units * UNIT, reached.before, equal, 0};
  in.cuts[model] = {from_bits(bin.value), units * UNIT};
}

__device__ inline void guess_first(const Selection& in, int model, const Ledger& ledger, Guess& guess, Slate& slate) {
  const Search& search = *ledger.search;
  if (!search.found) {
    Place place = place_of_rank(in, search.rank);
    place.at -= static_cast<int64_t>(search.above);
    guess_at(in, model, ledger, guess, place, slate);
  } else if (threadIdx.x == 0) {
    guess = {in.cuts[model].ties_end, 0, 0, 0};
  }
}

// Whether something is still to be proven, and each model has a guess.
__device__ inline bool guessed(const Task& task, const Guess* guesses) {
  bool all = true;
  for (int model = 0; model < task.in.models; ++model) all &= guesses[model].ties_end >= 0;
  return all && searching(task.in, task.room, task.workspace);
}

// --- counts of a section, by its block ---

// Eight of 16 bits that the sweep asks for next: they stay in the first cache.
__device__ __forceinline__ Raw8 first8(const View& view, int64_t at, int64_t end) {
  if (at + EIGHT > end || view.address % 16 != 0) return raw8(view, at, end);
  return {{__ldca(reinterpret_cast<const uint4*>(view.address) + at / EIGHT), {}}};
}

// Above in the lower half, equal in the upper one: the sums of a warp fit. A NaN is neither, and neither is what is
// past the end: where the magnitude is 0, `report` knows better. In assembly, as the compiler takes two instructions
// for each sum under a condition.
__device__ __forceinline__ uint32_t tally8(const float (&deltas)[EIGHT], float magnitude) {
  uint32_t both = 0;
#pragma unroll
  for (int i = 0; i < EIGHT; ++i) {
#ifdef __CUDACC__
    asm("{ .reg .pred above, equal;\n"
        "setp.gt.f32 above, %1, %2;\n"
        "setp.eq.f32 equal, %1, %2;\n"
        "@above add.u32 %0, %0, 1;\n"
        "@equal add.u32 %0, %0, 65536; }"
        : "+r"(both)
        : "f"(fabsf(deltas[i])), "f"(magnitude));
#else
    both += (fabsf(deltas[i]) > magnitude) + (fabsf(deltas[i]) == magnitude) * 0x10000u;
#endif
  }
  return both;
}

__device__ __forceinline__ void add_to(Tally& tally, uint32_t both) {
  both = __reduce_add_sync(EVERY_LANE, both);
  if (threadIdx.x % WARP != 0 || both == 0) return;
  atomicAdd(&tally.above, both & 0xffff);
  atomicAdd(&tally.equal, both >> 16);
}

__device__ __forceinline__ void add_to(Tally* tallies, int models, const Sides& sides) {
#pragma unroll
  for (int m = 0; m < PLAIN_MODELS; ++m) {
    if (m >= models) continue;
    const uint32_t above = __reduce_add_sync(EVERY_LANE, static_cast<uint32_t>(sides.above[m]));
    const uint32_t least = __reduce_add_sync(EVERY_LANE, static_cast<uint32_t>(sides.least[m]));
    if (threadIdx.x % WARP != 0) continue;
    atomicAdd(&tallies[m].above, above);
    atomicAdd(&tallies[m].equal, least - above);
  }
}

// What a unit holds of each model, by every thread of the block.
__device__ __forceinline__ void tally_unit(const Selection& in, int64_t unit, Tally* tallies) {
  const int64_t at = unit * UNIT + threadIdx.x * EIGHT;
  const bool has_base = in.inputs > in.models;
#pragma unroll 1
  for (int group = 0; group < in.models; group += AT_ONCE) {
    const Raw8 raw = has_base ? first8(in.views[in.models], at, in.elements) : Raw8{};
    Raw8 raws[AT_ONCE] = {};  // else what is not read counts as alive all through the kernel
#pragma unroll
    for (int m = 0; m < AT_ONCE; ++m) {
      if (group + m < in.models) raws[m] = first8(in.views[group + m], at, in.elements);
    }
    float base[EIGHT];
    widen8(raw, has_base ? dtype_of(in.views[in.models]) : DType::F32, base);
#pragma unroll
    for (int m = 0; m < AT_ONCE; ++m) {
      if (group + m >= in.models) continue;
      float deltas[EIGHT];
      widen8(raws[m], dtype_of(in.views[group + m]), deltas);
      for (int i = 0; i < EIGHT; ++i) deltas[i] -= base[i];
      add_to(tallies[group + m], tally8(deltas, in.cuts[group + m].magnitude));
    }
  }
}

// The tallies of a section of so many elements, once every thread of its block is done.
__device__ inline void report(const Task& task, int64_t elements, const Tally* tallies, Guess* guesses) {
  for (int model = threadIdx.x; model < task.in.models; model += SELECT_THREADS) {
    const Ledger ledger(task.room, task.workspace, model);
    if (ledger.search->found) continue;
    const Tally tally = tallies[model];
    const uint32_t equal = ledger.search->magnitude == 0 ? static_cast<uint32_t>(elements) - tally.above : tally.equal;
    ledger.sections[task.team.rank] = equal;
    atomicAdd(&ledger.search->above, static_cast<unsigned long long>(tally.above));
    atomicAdd(&guesses[model].equals, static_cast<unsigned long long>(equal));
  }
}

// --- the proof ---

// A guess that is right is a search that is over; one that is not has the next one made.
__device__ inline void prove(const Selection& in, int model, const Room& room, const Ledger& ledger, Guess& guess,
                             Slate& slate) {
  const Search search = *ledger.search;
  const Guess before = guess;
  sync_block();
  const int64_t wanted = search.rank - static_cast<int64_t>(search.above);
  const auto equals = static_cast<int64_t>(before.equals);
  if (0 < wanted && wanted <= equals)
    return locate(in, model, room, ledger, search.magnitude, wanted, equals, ledger.sections, 1, slate);
  const int64_t missed = early_share(in, wanted <= 0 ? wanted : wanted - equals);
  Place place = {before.before + missed, fabs(static_cast<double>(missed))};
  if (wanted > 0) place.at += before.equal + (missed > 0 ? 0 : 1);
  guess_at(in, model, ledger, guess, place, slate);
}

// --- what is swept again ---

// Units `from` ... `to` - 1, of less than 2^42 elements.
struct Stretch {
  int from, to;

  __device__ bool holds(int unit) const { return from <= unit && unit < to; }
};

__device__ inline Stretch all_of(const Item& item) {
  return {0, static_cast<int>((item.elements + UNIT - 1) / UNIT)};
}

// Where equals were kept up to the one end, and should have been up to the other.
__device__ inline Stretch between(const Item& item, int64_t end, int64_t other) {
  const int64_t low = lesser(end, other) - item.begin;
  const int64_t high = lesser((end < other ? other : end) - item.begin, item.elements);
  if (end == other || low >= high || high <= 0) return {0, 0};
  return {static_cast<int>((low > 0 ? low : 0) / UNIT), static_cast<int>((high + UNIT - 1) / UNIT)};
}

// Calls sweep(from, to) for runs of all units that some of the stretches hold, each once; the blocks of the team share
// them.
template <class StretchOf, class SweepUnits>
__device__ __forceinline__ void for_each_run(const Team& team, int stretches, const StretchOf& stretch_of,
                                             const SweepUnits& sweep) {
#pragma unroll 1
  for (int number = 0; number < stretches; ++number) {
    const Stretch stretch = stretch_of(number);
    const auto is_swept = [&](int unit) {
      bool swept = false;
#pragma unroll 1
      for (int before = 0; before < number; ++before) swept |= stretch_of(before).holds(unit);
      return swept;
    };
#pragma unroll 1
    for (int first = stretch.from + team.rank * RUN_UNITS; first < stretch.to; first += team.size * RUN_UNITS) {
      const int last = first + RUN_UNITS < stretch.to ? first + RUN_UNITS : stretch.to;
#pragma unroll 1
      for (int from = first, to; from < last; from = to) {
        to = from + 1;
        if (is_swept(from)) continue;
        while (to < last && !is_swept(to)) ++to;
        sweep(from, to);
      }
    }
  }
}

// --- what was counted ---

// Overflow depends on the cuts: what a sweep has counted is taken back. True where there was some.
__device__ inline bool take_back_overflow(const char* table, const Item& item) {
  bool any = false;
  for (int setting = 0; item.overflow && setting < item.settings; ++setting) {
    Count& overflow = at_place<Count>(table, item.overflow)[setting];
    any |= overflow != 0;
    overflow = 0;
  }
  return any;
}

}  // namespace
}  // namespace fastmerge
