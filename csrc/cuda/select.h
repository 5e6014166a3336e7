// Exact selection on the device: each model's k-th largest magnitude, and where equals to it stop being kept.
//
// A sample brackets the magnitude. One read of all inputs counts what lies above the bracket and, in bins of shared
// memory, inside it; a bin whose elements are all of one magnitude, as those of 16-bit weights' deltas mostly are,
// proves it. The bins are kept per section of the tensor, so that only the section where the equals stop is looked at
// again. A bin of several magnitudes is the next bracket, and so is the side on which a bracket missed. So the bytes
// read per element are those of its inputs, once for 16-bit weights and twice for large float32 tensors, whose bins
// hold more magnitudes than one; what is no larger than a sample is read once. Not yet measured on a card.
#pragma once
#include <cmath>
#include <limits>

#include "layout.h"
#include "ops.h"

namespace fastmerge {
namespace {

constexpr int SELECT_THREADS = 256;

// Tensors laid end to end, each of `models` views and then the base's where `inputs` counts one more.
struct Selection {
  const View* views;
  const int64_t* sizes;  // elements of each tensor
  int tensors;
  int models;
  int inputs;
  int64_t elements;      // of all of them
  const int64_t* ranks;  // per model
  Cut* cuts;             // per model
};

// Who works together on one selection: one block, or the whole of a cooperative grid.
struct Team {
  Barrier* barrier;
  int size;  // in blocks
  int rank;

  __device__ void sync() const { size > 1 ? sync_grid(barrier) : sync_block(); }
};

constexpr int SAMPLES = 10240, RUN = 2 * EIGHT;  // a run of 16-bit neighbours is one sector of 32 bytes
constexpr int BINS = 1024;
constexpr int DIGITS = 2048;
// Models read together, so that the base is read once for them; a fourth would spill registers.
constexpr int AT_ONCE = 3;
constexpr int BLOCK_SECTIONS = 8;                 // of a selection that is one block's work
constexpr int64_t UNIT = SELECT_THREADS * EIGHT;  // eight for each thread of a block
constexpr int64_t TILE = 4 * UNIT;
constexpr int64_t ALL_EQUALS = std::numeric_limits<int64_t>::max();
constexpr uint32_t NO_VALUE = 0xffffffff, MIXED = 0xfffffffe;  // no magnitude; more than one

// The bracket [low, high] in bits of the magnitude; a bin of it holds 2^shift magnitudes.
struct Bracket {
  uint32_t low, high;
  int32_t shift;
};

// How far the search for one model's magnitude is.
struct Search {
  int64_t rank;
  unsigned long long above;  // elements above the bracket
  Bracket bracket;
  bool found;
  uint32_t magnitude;
  int section;     // where the last equal that is kept lies; -1: the cut is known
  int64_t wanted;  // how many equals of that section are kept
};

struct Bin {
  unsigned long long count;
  uint32_t value;  // of all its elements, NO_VALUE or MIXED
};

// The memory that a team needs for selections of at most so many models and tiles.
struct Room {
  int models;
  int sections;
  int64_t tiles;  // per section

  FASTMERGE_INLINE size_t bytes() const { return (models * model_bytes() + 255) / 256 * 256; }
  FASTMERGE_INLINE size_t model_bytes() const {
    const size_t counts = static_cast<size_t>(sections) * BINS + static_cast<size_t>(tiles);
    return sizeof(Search) + (sections > 0 ? sizeof(Bin) * BINS : 0) + (counts * sizeof(uint32_t) + 7) / 8 * 8;
  }
};

FASTMERGE_INLINE int64_t tiles_in(int64_t elements) {
  return (elements + TILE - 1) / TILE;
}

// `tiles` of the largest selection, `largest` its elements: those that are their own sample need next to nothing.
FASTMERGE_INLINE Room room_for(int models, int64_t largest, int64_t tiles, int team_blocks) {
  if (largest <= SAMPLES) return {models, 0, 0};
  const int sections = team_blocks > 1 ? team_blocks : BLOCK_SECTIONS;
  return {models, sections, (tiles + sections - 1) / sections};
}

// One model's part of the room.
struct Ledger {
  Search* search;
  Bin* bins;           // [BINS], of all sections
  uint32_t* sections;  // [sections, BINS], counts alone
  uint32_t* tiles;     // [tiles of one section]: equals

  __device__ Ledger(const Room& room, char* workspace, int model) {
    search = reinterpret_cast<Search*>(workspace + model * room.model_bytes());
    bins = reinterpret_cast<Bin*>(search + 1);
    sections = reinterpret_cast<uint32_t*>(bins + BINS);
    tiles = sections + static_cast<int64_t>(room.sections) * BINS;
  }
};

// What a block keeps in shared memory; the sample and the bins are never needed at the same time.
struct Slate {
  int64_t warps[SELECT_THREADS / WARP];
  int64_t item, before;  // the answer of `reach`
  uint32_t digits[DIGITS];
  Bracket brackets[AT_ONCE];
  union {
    uint32_t sample[SAMPLES];
    struct {
      uint32_t value[AT_ONCE][BINS];
      uint32_t count[AT_ONCE][BINS];
    } bins;
  };
};
constexpr size_t SELECT_SHARED = sizeof(Slate);

// A place in the concatenated vector: `begin` in a tensor that starts at `start`.
struct Cursor {
  int tensor;
  int64_t begin;
  int64_t start;
};

struct Reached {
  int64_t item;
  int64_t before;
};

__device__ inline uint32_t magnitude_of(float delta) {
  const uint32_t magnitude = to_bits(delta) & 0x7fffffff;
  return magnitude > INFINITE ? 0 : magnitude;
}

// --- sums over the block ---

// Every thread gets the sum over the threads before it; the slate's `warps` add up to the block's.
__device__ inline int64_t sum_before(int64_t mine, Slate& slate) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int64_t sum = mine;
  for (int lanes = 1; lanes < WARP; lanes *= 2) {
    const int64_t other = __shfl_up_sync(EVERY_LANE, sum, lanes);
    if (lane >= lanes) sum += other;
  }
  if (lane == WARP - 1) slate.warps[warp] = sum;
  sync_block();
  for (int i = 0; i < warp; ++i) sum += slate.warps[i];
  return sum - mine;
}

// The first item at which the sum of count(0), count(1) ... reaches `wanted`, and the sum before it; `items` where it
// never does.
template <class Count>
__device__ Reached reach(int64_t items, int64_t wanted, Slate& slate, const Count& count) {
  const int64_t each = (items + SELECT_THREADS - 1) / SELECT_THREADS;
  const int64_t from = lesser(items, each * threadIdx.x), to = lesser(items, from + each);
  int64_t mine = 0;
#pragma unroll 1
  for (int64_t item = from; item < to; ++item) mine += count(item);
  if (threadIdx.x == 0) slate.item = items;
  int64_t before = sum_before(mine, slate);
  if (before < wanted && wanted <= before + mine) {
    int64_t item = from;
#pragma unroll 1
    for (int64_t here; before + (here = count(item)) < wanted; ++item) before += here;
    slate.item = item;
    slate.before = before;
  }
  sync_block();
  const Reached reached = {slate.item, slate.before};
  sync_block();
  return reached;
}

// --- elements ---

__device__ inline Cursor seek(const Selection& in, int64_t tile) {
  Cursor cursor = {0, 0, 0};
  for (int64_t tiles; tile >= (tiles = tiles_in(in.sizes[cursor.tensor])); tile -= tiles) {
    cursor.start += in.sizes[cursor.tensor++];
  }
  cursor.begin = tile * TILE;
  return cursor;
}

// To the next tile, which is there.
__device__ inline void advance(const Selection& in, Cursor& cursor) {
  cursor.begin += TILE;
  while (cursor.begin >= in.sizes[cursor.tensor]) {
    cursor.start += in.sizes[cursor.tensor++];
    cursor.begin = 0;
    if (cursor.tensor == in.tensors) return;
  }
}

__device__ inline int64_t tiles_of(const Selection& in) {
  int64_t tiles = 0;
  for (int tensor = 0; tensor < in.tensors; ++tensor) tiles += tiles_in(in.sizes[tensor]);
  return tiles;
}

__device__ inline const View* views_of(const Selection& in, int tensor) {
  return in.views + static_cast<int64_t>(tensor) * in.inputs;
}

// The deltas of eight elements from `at`, a multiple of 8; 0 past the tensor's end.
__device__ inline void deltas8(const Selection& in, int tensor, int model, int64_t at, float (&deltas)[EIGHT]) {
  const View* views = views_of(in, tensor);
  load8(views[model], at, in.sizes[tensor], deltas);
  if (in.inputs == in.models) return;
  float base[EIGHT];
  load8(views[in.models], at, in.sizes[tensor], base);
  for (int i = 0; i < EIGHT; ++i) deltas[i] -= base[i];
}

// --- the sample ---

// The place of the next run: somewhere in its share of the elements, so that no period of theirs can meet the sample's.
__device__ inline int64_t place_of(int run, int64_t elements) {
  constexpr int runs = SAMPLES / RUN;
  const int64_t share = elements / runs;
  const uint64_t noise = (static_cast<uint64_t>(run) + 1) * 0x9E3779B97F4A7C15 >> 32;
  return run * share + static_cast<int64_t>(noise * static_cast<uint64_t>(share - RUN + 1) >> 32);
}

// Fills the slate's sample with magnitudes, at their flat indices where the selection is no larger than it. Returns how
// many there are; between them may be some NO_VALUE.
__device__ inline int take_sample(const Selection& in, int model, Slate& slate) {
  float deltas[EIGHT];
  int taken = 0;
  if (in.elements <= SAMPLES) {
    int64_t start = 0;
    for (int tensor = 0; tensor < in.tensors; start += in.sizes[tensor++]) {
      for (int64_t at = threadIdx.x * EIGHT; at < in.sizes[tensor]; at += SELECT_THREADS * EIGHT) {
        deltas8(in, tensor, model, at, deltas);
        for (int i = 0; i < EIGHT && at + i < in.sizes[tensor]; ++i) {
          slate.sample[start + at + i] = magnitude_of(deltas[i]);
        }
      }
    }
    taken = static_cast<int>(in.elements);
  } else {
    for (int at = threadIdx.x * EIGHT; at < SAMPLES; at += SELECT_THREADS * EIGHT) {
      int64_t place = place_of(at / RUN, in.elements);
      int tensor = 0;
      while (place >= in.sizes[tensor]) place -= in.sizes[tensor++];
      place = place / EIGHT * EIGHT + at % RUN;
      deltas8(in, tensor, model, place, deltas);
      for (int i = 0; i < EIGHT; ++i) {
        const bool there = place + i < in.sizes[tensor];
        slate.sample[at + i] = there ? magnitude_of(deltas[i]) : NO_VALUE;
        taken += there;
      }
    }
    sum_before(taken, slate);
    taken = 0;
    for (const int64_t warp : slate.warps) taken += static_cast<int>(warp);
  }
  sync_block();
  return taken;
}

struct Placed {
  uint32_t magnitude;
  int64_t above, equal;  // samples
};

// The rank-th largest of the sample, by its digits of 11, 10 and 10 bits.
__device__ inline Placed largest_of(Slate& slate, int64_t rank, int samples) {
  Placed placed = {0, 0, 0};
#pragma unroll 1
  for (int shift = 20, bits = 11; shift >= 0; shift -= 10, bits = 10) {
    const int digits = 1 << bits;
    for (int i = threadIdx.x; i < digits; i += SELECT_THREADS) slate.digits[i] = 0;
    sync_block();
    for (int i = threadIdx.x; i < samples; i += SELECT_THREADS) {
      const uint32_t value = slate.sample[i];
      if (value >> (shift + bits) == placed.magnitude) atomicAdd(&slate.digits[value >> shift & (digits - 1)], 1u);
    }
    sync_block();
    const auto from_the_top = [&](int64_t item) -> int64_t { return slate.digits[digits - 1 - item]; };
    const Reached reached = reach(digits, rank - placed.above, slate, from_the_top);
    placed.magnitude = placed.magnitude << bits | static_cast<uint32_t>(digits - 1 - reached.item);
    placed.above += reached.before;
    placed.equal = from_the_top(reached.item);
    sync_block();
  }
  return placed;
}

// --- one model, by one block ---

// The next bracket.
__device__ inline void narrow(const Ledger& ledger, uint32_t low, uint32_t high) {
  if (threadIdx.x == 0) {
    Search& search = *ledger.search;
    search.above = 0;
    search.bracket = {low, high, 0};
    while ((high - low) >> search.bracket.shift >= BINS) ++search.bracket.shift;
  }
  for (int bin = threadIdx.x; bin < BINS; bin += SELECT_THREADS) ledger.bins[bin] = {0, NO_VALUE};
}

__device__ inline void settle(const Ledger& ledger, Cut* cut, uint32_t magnitude, int64_t ties_end) {
  if (threadIdx.x != 0) return;
  ledger.search->found = true;
  ledger.search->section = -1;
  *cut = {from_bits(magnitude), ties_end};
}

// The cut itself of a selection that is its own sample; otherwise the magnitudes within five standard deviations of the
// rank in the sample.
__device__ inline void open(const Selection& in, int model, const Ledger& ledger, Slate& slate) {
  const int64_t rank = in.ranks[model];
  Cut* cut = in.cuts + model;
  if (rank <= 0) return settle(ledger, cut, INFINITE, 0);
  if (rank >= in.elements) return settle(ledger, cut, 0, ALL_EQUALS);
  const int taken = take_sample(in, model, slate);
  if (in.elements <= SAMPLES) {
    const Placed placed = largest_of(slate, rank, taken);
    const int64_t wanted = rank - placed.above;
    if (wanted == placed.equal) return settle(ledger, cut, placed.magnitude, ALL_EQUALS);
    const Reached last =
        reach(taken, wanted, slate, [&](int64_t item) -> int64_t { return slate.sample[item] == placed.magnitude; });
    return settle(ledger, cut, placed.magnitude, last.item + 1);
  }
  const double share = static_cast<double>(rank) / static_cast<double>(in.elements);
  const double middle = share * taken;
  const double margin = 5 * sqrt(middle * (1 - share)) + 5;
  const auto first = static_cast<int>(middle - margin), last = static_cast<int>(middle + margin) + 1;
  const uint32_t high = first > 0 ? largest_of(slate, first, SAMPLES).magnitude : INFINITE;
  const uint32_t low = last < taken ? largest_of(slate, last, SAMPLES).magnitude : 0;
  if (threadIdx.x == 0) {
    ledger.search->rank = rank;
    ledger.search->found = false;
    ledger.search->section = -1;
  }
  narrow(ledger, low, high);
}

// Once the magnitude is known, and how many of all its equals are kept: the section where the last of these lies, by
// the sections' counts of it, which lie so far apart.
__device__ inline void locate(const Selection& in, int model, const Room& room, const Ledger& ledger,
                              uint32_t magnitude, int64_t wanted, int64_t equals, const uint32_t* counts, int apart,
                              Slate& slate) {
  if (wanted == equals) return settle(ledger, in.cuts + model, magnitude, ALL_EQUALS);
  const Reached section =
      reach(room.sections, wanted, slate, [&](int64_t item) -> int64_t { return counts[item * apart]; });
  if (threadIdx.x == 0) {
    ledger.search->found = true;
    ledger.search->magnitude = magnitude;
    ledger.search->section = static_cast<int>(section.item);
    ledger.search->wanted = wanted - section.before;
  }
}

// What the counts of a whole read say.
__device__ inline void conclude(const Selection& in, int model, const Room& room, const Ledger& ledger, Slate& slate) {
  const Search search = *ledger.search;
  const auto [low, high, shift] = search.bracket;
  sync_block();
  const auto above = static_cast<int64_t>(search.above);
  if (above >= search.rank) return narrow(ledger, high + 1, INFINITE);
  const auto from_the_top = [&](int64_t item) { return static_cast<int64_t>(ledger.bins[BINS - 1 - item].count); };
  const Reached reached = reach(BINS, search.rank - above, slate, from_the_top);
  if (reached.item == BINS) return narrow(ledger, 0, low - 1);
  const auto bin = static_cast<uint32_t>(BINS - 1 - reached.item);
  const uint32_t least = low + (bin << shift), magnitude = ledger.bins[bin].value;
  if (magnitude == MIXED) {
    sync_block();
    return narrow(ledger, least, static_cast<uint32_t>(lesser(high, least + (1u << shift) - 1)));
  }
  const int64_t wanted = search.rank - above - reached.before;
  locate(in, model, room, ledger, magnitude, wanted, from_the_top(reached.item), ledger.sections + bin, BINS, slate);
}

// --- all inputs, by the whole team ---

// Several threads and blocks may come to one bin with different magnitudes at once: who was first stays, or MIXED.
__device__ inline void note(uint32_t* value, uint32_t magnitude) {
  uint32_t old = *static_cast<volatile uint32_t*>(value);
  if (old == magnitude || old == MIXED) return;
  if (old == NO_VALUE) old = atomicCAS(value, NO_VALUE, magnitude);
  if (old != NO_VALUE && old != magnitude) atomicExch(value, MIXED);
}

// What one thread has seen of one model.
struct Seen {
  uint32_t above;
  uint32_t value, pending;  // equals met in a row are counted here before they go to their bin
};

__device__ inline void deposit(const Seen& seen, int i, Slate& slate) {
  if (seen.pending == 0) return;
  const uint32_t bin = (seen.value - slate.brackets[i].low) >> slate.brackets[i].shift;
  note(&slate.bins.value[i][bin], seen.value);
  atomicAdd(&slate.bins.count[i][bin], seen.pending);
}

// Which models are read together.
struct Few {
  int model[AT_ONCE];
  int count;
};

// Without an index that is not known beforehand, which would put the models into memory.
__device__ __forceinline__ void add(Few& few, int model) {
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) few.model[i] = i == few.count ? model : few.model[i];
  ++few.count;
}

__device__ __forceinline__ uint32_t choose(bool first, uint32_t yes, uint32_t no) {
  return first ? yes : no;
}

// One of eight numbers in registers.
__device__ __forceinline__ uint32_t pick8(const uint32_t (&of)[EIGHT], int place) {
  const bool odd = place & 1;
  const uint32_t low = choose(place & 2, choose(odd, of[3], of[2]), choose(odd, of[1], of[0]));
  const uint32_t high = choose(place & 2, choose(odd, of[7], of[6]), choose(odd, of[5], of[4]));
  return choose(place & 4, high, low);
}

// What the first pass over eight deltas leaves is rare, so it is taken one by one: the code stays short.
__device__ __forceinline__ void count8(const float (&deltas)[EIGHT], int valid, int i, Seen& seen, Slate& slate) {
  const float low = from_bits(slate.brackets[i].low), high = from_bits(slate.brackets[i].high);
  uint32_t magnitudes[EIGHT], inside = 0;
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) {  // a NaN is neither above nor below
    const float magnitude = fabsf(deltas[e]);
    seen.above += magnitude > high;
    inside |= static_cast<uint32_t>(!(magnitude < low) && !(magnitude > high)) << e;
    magnitudes[e] = to_bits(magnitude);
  }
  for (; inside != 0; inside &= inside - 1) {
    const int e = __ffs(static_cast<int>(inside)) - 1;
    uint32_t value = pick8(magnitudes, e);
    if (value > INFINITE) {
      if (e >= valid || low != 0) continue;
      value = 0;
    }
    if (value != seen.value) {
      deposit(seen, i, slate);
      seen.value = value;
      seen.pending = 0;
    }
    ++seen.pending;
  }
}

// Counts some models of a tile, [begin, end) of a tensor, into the slate's bins.
template <Layout layout>
__device__ __forceinline__ void count_tile(const View* views, const View* base_view, int64_t begin, int64_t end,
                                           const Few& few, Seen (&seen)[AT_ONCE], Slate& slate) {
  const auto dtype = [](const View& view) {
    return layout == Layout::ANY ? dtype_of(view) : static_cast<DType>(layout);
  };
  for (int64_t at = begin + threadIdx.x * EIGHT; at < end; at += SELECT_THREADS * EIGHT) {
    const int valid = layout == Layout::ANY ? static_cast<int>(lesser(EIGHT, end - at)) : EIGHT;
    Raw8 raw[AT_ONCE] = {};  // else what is not read counts as alive all through the kernel, and takes its registers
    float base[EIGHT] = {};
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (i < few.count) raw[i] = read8<layout>(views[few.model[i]], at, end);
    }
    if (base_view) widen8(read8<layout>(*base_view, at, end), dtype(*base_view), base);
    if (valid < EIGHT) {
      for (int e = 0; e < EIGHT; ++e) base[e] = e < valid ? base[e] : from_bits(0x7fc00000);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (i >= few.count) continue;
      float deltas[EIGHT];
      widen8(raw[i], dtype(views[few.model[i]]), deltas);
#pragma unroll
      for (int e = 0; e < EIGHT; ++e) deltas[e] -= base[e];
      count8(deltas, valid, i, seen[i], slate);
    }
  }
}

// The same of any stretch, [begin, end) of a tensor.
__device__ __forceinline__ void count_stretch(const Selection& in, int tensor, int64_t begin, int64_t end,
                                              const Few& few, Seen (&seen)[AT_ONCE], Slate& slate) {
  const View* views = views_of(in, tensor);
  const View* base = in.inputs > in.models ? views + in.models : nullptr;
  switch (layout_of(views, in.inputs, end - begin)) {
    case Layout::F32: count_tile<Layout::F32>(views, base, begin, end, few, seen, slate); break;
    case Layout::F16: count_tile<Layout::F16>(views, base, begin, end, few, seen, slate); break;
    case Layout::BF16: count_tile<Layout::BF16>(views, base, begin, end, few, seen, slate); break;
    case Layout::ANY: count_tile<Layout::ANY>(views, base, begin, end, few, seen, slate);
  }
}

__device__ inline void count_tiles(const Selection& in, const Few& few, int64_t from, int64_t to, Seen (&seen)[AT_ONCE],
                                   Slate& slate) {
  Cursor cursor = seek(in, from);
  for (int64_t tile = from; tile < to; ++tile, advance(in, cursor)) {
    const int64_t end = lesser(in.sizes[cursor.tensor], cursor.begin + TILE);
    count_stretch(in, cursor.tensor, cursor.begin, end, few, seen, slate);
  }
}

// What `read` counts of some models that are still searched. `section`: where the counts are kept apart, too; or -1.
template <class Read>
__device__ __forceinline__ void count_section(const Room& room, char* workspace, const Few& few, int section,
                                              Slate& slate, const Read& read) {
  for (int i = threadIdx.x; i < AT_ONCE * BINS; i += SELECT_THREADS) {
    slate.bins.value[0][i] = NO_VALUE;
    slate.bins.count[0][i] = 0;
  }
  Seen seen[AT_ONCE];
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    seen[i] = {0, NO_VALUE, 0};
    if (threadIdx.x == 0 && i < few.count) {
      slate.brackets[i] = Ledger(room, workspace, few.model[i]).search->bracket;
    }
  }
  sync_block();
  read(seen);
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    if (i < few.count) deposit(seen[i], i, slate);
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    if (i >= few.count) continue;
    const Ledger ledger(room, workspace, few.model[i]);
    const unsigned long long above = warp_sum(static_cast<unsigned long long>(seen[i].above));
    if (threadIdx.x % WARP == 0 && above > 0) atomicAdd(&ledger.search->above, above);
    for (int bin = threadIdx.x; bin < BINS; bin += SELECT_THREADS) {
      const uint32_t here = slate.bins.count[i][bin];
      if (section >= 0) ledger.sections[section * BINS + bin] = here;
      if (here == 0) continue;
      atomicAdd(&ledger.bins[bin].count, static_cast<unsigned long long>(here));
      note(&ledger.bins[bin].value, slate.bins.value[i][bin]);
    }
  }
  sync_block();
}

// The next few models that are still searched, from `next` on.
__device__ __forceinline__ Few few_from(int& next, const Selection& in, const Room& room, char* workspace) {
  Few few = {};
  for (; next < in.models && few.count < AT_ONCE; ++next) {
    if (!Ledger(room, workspace, next).search->found) add(few, next);
  }
  return few;
}

// One read of all inputs for some models that are still searched.
__device__ inline void census(const Team& team, const Selection& in, const Room& room, char* workspace, const Few& few,
                              Slate& slate) {
  const int64_t tiles = tiles_of(in);
  for (int section = team.rank; section < room.sections; section += team.size) {
    count_section(room, workspace, few, section, slate, [&](Seen(&seen)[AT_ONCE]) {
      count_tiles(in, few, section * tiles / room.sections, (section + 1) * tiles / room.sections, seen, slate);
    });
  }
}

// --- where equals stop ---

// Counts the equals in each tile of the section where the last that is kept lies.
__device__ inline void count_equals(const Team& team, const Selection& in, int model, const Room& room,
                                    const Ledger& ledger, Slate& slate) {
  const int64_t tiles = tiles_of(in), section = ledger.search->section;
  const int64_t from = section * tiles / room.sections, to = (section + 1) * tiles / room.sections;
  for (int64_t tile = from + team.rank; tile < to; tile += team.size) {
    const Cursor cursor = seek(in, tile);
    const int64_t end = in.sizes[cursor.tensor], until = lesser(end, cursor.begin + TILE);
    int64_t equal = 0;
    for (int64_t at = cursor.begin + threadIdx.x * EIGHT; at < until; at += SELECT_THREADS * EIGHT) {
      float deltas[EIGHT];
      deltas8(in, cursor.tensor, model, at, deltas);
      for (int e = 0; e < EIGHT; ++e) equal += at + e < end && magnitude_of(deltas[e]) == ledger.search->magnitude;
    }
    const int64_t before = sum_before(equal, slate);
    if (threadIdx.x == SELECT_THREADS - 1) ledger.tiles[tile - from] = static_cast<uint32_t>(before + equal);
    sync_block();
  }
}

// The tile, and in it the element, by one block.
__device__ inline void find_end(const Selection& in, int model, const Room& room, const Ledger& ledger, Slate& slate) {
  const int64_t tiles = tiles_of(in), section = ledger.search->section;
  const int64_t from = section * tiles / room.sections, to = (section + 1) * tiles / room.sections;
  const Reached tile =
      reach(to - from, ledger.search->wanted, slate, [&](int64_t item) -> int64_t { return ledger.tiles[item]; });
  const Cursor cursor = seek(in, from + tile.item);
  const int64_t count = lesser(TILE, in.sizes[cursor.tensor] - cursor.begin);
  const auto equals8 = [&](int64_t item) -> int64_t {
    float deltas[EIGHT];
    const int64_t at = cursor.begin + item * EIGHT;
    deltas8(in, cursor.tensor, model, at, deltas);
    int64_t equal = 0;
    for (int e = 0; e < EIGHT; ++e) {
      equal += at + e < cursor.begin + count && magnitude_of(deltas[e]) == ledger.search->magnitude;
    }
    return equal;
  };
  const Reached eight = reach((count + EIGHT - 1) / EIGHT, ledger.search->wanted - tile.before, slate, equals8);
  if (threadIdx.x != 0) return;
  float deltas[EIGHT];
  deltas8(in, cursor.tensor, model, cursor.begin + eight.item * EIGHT, deltas);
  int64_t left = ledger.search->wanted - tile.before - eight.before;
  int last = 0;
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) {
    if (magnitude_of(deltas[e]) == ledger.search->magnitude && left-- > 0) last = e;
  }
  const int64_t end = cursor.start + cursor.begin + eight.item * EIGHT + last + 1;
  in.cuts[model] = {from_bits(ledger.search->magnitude), end};
}

__device__ inline bool searching(const Selection& in, const Room& room, char* workspace) {
  bool any = false;
  for (int model = 0; model < in.models; ++model) any |= !Ledger(room, workspace, model).search->found;
  return any;
}

// Each model's cut, in in.cuts for every block of the team on return. `workspace` is room.bytes() of device memory that
// may hold anything, `shared` SELECT_SHARED of the block's.
__device__ inline void select(const Team& team, const Selection& in, const Room& room, char* workspace, char* shared) {
  Slate& slate = *reinterpret_cast<Slate*>(shared);
  const auto ledger = [&](int model) { return Ledger(room, workspace, model); };
  for (int model = team.rank; model < in.models; model += team.size) {
    open(in, model, ledger(model), slate);
    sync_block();
  }
  team.sync();
  while (in.elements > SAMPLES && searching(in, room, workspace)) {
    for (int next = 0; next < in.models;) {
      const Few few = few_from(next, in, room, workspace);
      if (few.count > 0) census(team, in, room, workspace, few, slate);
    }
    team.sync();
    for (int model = team.rank; model < in.models; model += team.size) {
      if (!ledger(model).search->found) conclude(in, model, room, ledger(model), slate);
      sync_block();
    }
    team.sync();
  }
  for (int model = 0; model < in.models; ++model) {
    if (ledger(model).search->section >= 0) count_equals(team, in, model, room, ledger(model), slate);
  }
  team.sync();
  for (int model = team.rank; model < in.models; model += team.size) {
    if (ledger(model).search->section >= 0) find_end(in, model, room, ledger(model), slate);
  }
  team.sync();
}

}  // namespace
}  // namespace fastmerge
