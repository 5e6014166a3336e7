// The op `threshold`: the exact k-th largest magnitude of each model's delta, and where equals to it stop being kept.
//
// A sample brackets the magnitude. Deltas of 16-bit weights are discrete: where a few values are most of the bracket,
// one read counts what lies above each of them and equals it, which proves the k-th and, tile by tile, tells where its
// equals stop. Elsewhere a census counts what lies above the bracket and, in bins, inside it; the bin that holds the
// k-th is the next bracket, until a bin is one magnitude wide. A bracket or a guess that missed says on which side.
#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

#include "ops.h"
#include "samples.h"

namespace fastmerge {
namespace {

constexpr int64_t TILE = 64 * CHUNK;
constexpr int64_t RUNS = 2048, RUN = 16, SAMPLES = RUNS * RUN;  // a run of neighbours costs one cache line per input
constexpr int64_t ALONE = 32 * TILE;                            // groups up to this size are one worker's work

constexpr int64_t EVERY = std::numeric_limits<int64_t>::max();

struct Search {
  int64_t rank;
  bool found;
  uint32_t magnitude;
  int64_t wanted;  // how many of the `equal` elements at the magnitude are kept
  int64_t equal;
  int64_t ties_end;  // EVERY until it is known, or where all equals are kept
  int guess;         // the place of the magnitude in `tally`
  Tally tally;       // of guesses, while there are any
  Census census;
};

int64_t elements_of(const Group& group) {
  int64_t elements = 0;
  for (const Tensor& tensor : group) elements += tensor.elements;
  return elements;
}

// A group's tiles are those of its concatenated vector, whatever its tensors: there may be one per row of a matrix.
int64_t tiles_of(const Group& group) {
  return (elements_of(group) + TILE - 1) / TILE;
}

// Calls `each(tensor, at, count, index in the group)` for the chunks of a tile, until it returns true.
template <class Each>
void each_chunk(const Group& group, int64_t tile, const Each& each) {
  const int64_t begin = tile * TILE, end = begin + TILE;
  int64_t start = 0;
  for (const Tensor& tensor : group) {
    const int64_t last = std::min(end - start, tensor.elements);
    for (int64_t at = std::max<int64_t>(begin - start, 0); at < last; at += CHUNK) {
      if (each(tensor, at, static_cast<int>(std::min<int64_t>(CHUNK, last - at)), start + at)) return;
    }
    start += tensor.elements;
    if (start >= end) return;
  }
}

// Memory for one group's selection, in one block: searches, samples, and the equals of each guess per tile and model.
struct Desk {
  Search* searches;
  uint32_t* samples;
  int64_t* equals;

  static size_t bytes(int models, int64_t tiles) {
    return static_cast<size_t>(models) * (sizeof(Search) + SAMPLES * 4 + static_cast<size_t>(tiles) * CANDIDATES * 8);
  }
  Desk(char* block, int models)
      : searches(reinterpret_cast<Search*>(block)),
        samples(reinterpret_cast<uint32_t*>(searches + models)),
        equals(reinterpret_cast<int64_t*>(samples + static_cast<int64_t>(models) * SAMPLES)),
        models_(models) {}

  int64_t& equal(int64_t tile, int model, int guess) const {
    return equals[(tile * models_ + model) * CANDIDATES + guess];
  }

 private:
  int models_;
};

size_t worker_bytes(const Tensor& tensor) {
  return (Scratch::bytes(tensor.inputs) + 63) / 64 * 64 +
         static_cast<size_t>(tensor.models) * (sizeof(Census) + sizeof(Tally));
}

Census* censuses_at(char* block, const Tensor& tensor) {
  return reinterpret_cast<Census*>(block + (Scratch::bytes(tensor.inputs) + 63) / 64 * 64);
}

uint32_t magnitude_of(float delta) {
  return to_bits(delta) & 0x7fffffff;
}

void search_in(Census& census, uint32_t low, uint32_t high) {
  census = {};
  census.low = low;
  census.high = high;
  while ((high - low) >> census.shift >= BINS) ++census.shift;
}

// The most frequent of these magnitudes, in descending order, as guesses; none unless they are most of them.
void guess(Tally& tally, const uint32_t* begin, const uint32_t* end) {
  int64_t times[CANDIDATES], guessed = 0;
  for (const uint32_t *run = begin, *next; run < end; run = next) {
    next = std::find_if(run, end, [run](uint32_t value) { return value != *run; });
    int place = tally.values;
    while (place > 0 && times[place - 1] < next - run) --place;
    if (place == CANDIDATES) continue;
    tally.values = std::min(tally.values + 1, CANDIDATES);
    for (int i = tally.values - 1; i > place; --i) {
      times[i] = times[i - 1];
      tally.value[i] = tally.value[i - 1];
    }
    times[place] = next - run;
    tally.value[place] = *run;
  }
  for (int i = 0; i < tally.values; ++i) guessed += times[i];
  if (2 * guessed < end - begin) tally.values = 0;
  std::sort(tally.value, tally.value + tally.values, std::greater<uint32_t>());
}

void found(Search& search, uint32_t magnitude, int64_t above, int64_t equal) {
  search.found = true;
  search.magnitude = magnitude;
  search.wanted = search.rank - above;
  search.equal = equal;
}

// One past the place of the last of so many equals.
int64_t end_of_equals(const uint32_t* magnitudes, int64_t count, uint32_t equal, int64_t wanted) {
  constexpr int64_t BLOCK = 64;  // counted at a time, which the compiler makes vectors of
  int64_t at = 0;
  for (; at + BLOCK <= count; at += BLOCK) {
    const int64_t here = std::count(magnitudes + at, magnitudes + at + BLOCK, equal);
    if (here >= wanted) break;
    wanted -= here;
  }
  for (; wanted > 0; ++at) wanted -= magnitudes[at] == equal;
  return at;
}

// What all magnitudes say.
void settle(Search& search, const Kernels& kernels, const uint32_t* magnitudes, int64_t count) {
  const Kth kth = kernels.kth(magnitudes, count, search.rank);
  found(search, kth.magnitude, kth.above, kth.equal);
  if (search.wanted < search.equal) search.ties_end = end_of_equals(magnitudes, count, kth.magnitude, search.wanted);
}

// What the sample suggests for the k-th: the magnitudes within five standard deviations of its rank.
void bracket(Search& search, uint32_t* samples, int64_t count, int64_t elements) {
  const auto larger = std::greater<uint32_t>();
  const double share = static_cast<double>(search.rank) / static_cast<double>(elements);
  const double middle = share * static_cast<double>(count);
  const double margin = 5 * std::sqrt(middle * (1 - share)) + 5;
  const int64_t smallest = count - 1;
  const auto first = static_cast<int64_t>(std::max(middle - margin, 0.0));
  const auto last = static_cast<int64_t>(std::min(middle + margin, static_cast<double>(smallest)));
  const int64_t gone = narrow_to(samples, count, first, last);
  std::sort(samples, samples + count, larger);
  const uint32_t *high = samples + (first - gone), *low = samples + (last - gone);
  search_in(search.census, last < smallest ? *low : 0, first > 0 ? *high : INFINITE);
  guess(search.tally, high, low + 1);
}

// Small groups are looked at whole; of others one element in 64 at the most, in runs evenly apart.
void sample(const Group& group, const Kernels& kernels, Desk& desk, char* block, int64_t elements) {
  const Tensor& like = group.front();
  Scratch scratch(block, like.inputs);
  const bool whole = elements <= SAMPLES;
  const int64_t run = whole ? CHUNK : RUN;
  const int64_t stride = whole ? CHUNK : std::max<int64_t>(64 * RUN, elements / RUNS);
  int64_t taken = 0, next = 0, start = 0;
  for (const Tensor& tensor : group) {
    if (whole) next = start;
    for (; next - start < tensor.elements && taken < SAMPLES; next += stride) {
      const int64_t at = next - start;
      const int count = static_cast<int>(std::min({run, tensor.elements - at, SAMPLES - taken}));
      kernels.deltas(tensor, at, count, true, scratch);
      for (int model = 0; model < like.models; ++model) {
        uint32_t* to = desk.samples + model * SAMPLES + taken;
        for (int i = 0; i < count; ++i) to[i] = magnitude_of(scratch.wide[model * CHUNK + i]);
      }
      taken += count;
    }
    start += tensor.elements;
  }
  for (int model = 0; model < like.models; ++model) {
    Search& search = desk.searches[model];
    uint32_t* samples = desk.samples + model * SAMPLES;
    if (search.found) continue;
    if (whole) {
      settle(search, kernels, samples, taken);
    } else {
      bracket(search, samples, taken, elements);
    }
  }
}

// What finished counts say: the magnitude, or on which side of which guess to look next.
void conclude(Search& search, const Tally& tally) {
  uint32_t low = 0, high = INFINITE;
  for (int i = 0; i < tally.values; ++i) {
    if (search.rank <= tally.above[i]) {
      low = tally.value[i] + 1;
      break;
    }
    if (search.rank <= tally.above[i] + tally.equal[i]) {
      search.guess = i;
      return found(search, tally.value[i], tally.above[i], tally.equal[i]);
    }
    high = tally.value[i] - 1;
  }
  search.tally.values = 0;
  search_in(search.census, low, high);
}

// What a finished census says: the magnitude as the only guess, or a narrower bracket.
void conclude(Search& search, const Census& census) {
  if (census.above >= search.rank) return search_in(search.census, census.high + 1, INFINITE);
  int64_t above = census.above;
  for (int bin = BINS - 1; bin >= 0; --bin) {
    if (above + census.bins[bin] < search.rank) {
      above += census.bins[bin];
      continue;
    }
    const uint32_t low = census.low + (static_cast<uint32_t>(bin) << census.shift);
    if (census.shift > 0) {
      return search_in(search.census, low, std::min(census.high, low + (1u << census.shift) - 1));
    }
    if (above + census.bins[bin] == search.rank) return found(search, low, above, census.bins[bin]);
    search.tally = {1, {low}, {}, {}};  // to learn which of the equals stay
    return;
  }
  search_in(search.census, 0, census.low - 1);
}

void conclude(Search& search) {
  if (search.tally.values > 0) {
    const Tally tally = search.tally;
    conclude(search, tally);
  } else {
    const Census census = search.census;
    conclude(search, census);
  }
}

void count_tile(const Group& group, int64_t number, const Kernels& kernels, Desk& desk, char* block) {
  static std::mutex mutex;  // never held while an input is read
  const Tensor& like = group.front();
  Scratch scratch(block, like.inputs);
  Census* censuses = censuses_at(block, like);
  Tally* tallies = reinterpret_cast<Tally*>(censuses + like.models);
  for (int model = 0; model < like.models; ++model) {
    const Search& search = desk.searches[model];
    if (search.found) continue;
    tallies[model] = search.tally;
    std::fill_n(tallies[model].above, CANDIDATES, 0);
    std::fill_n(tallies[model].equal, CANDIDATES, 0);
    if (search.tally.values > 0) continue;  // a census is large to clear
    censuses[model] = {search.census.low, search.census.high, search.census.shift, 0, {}};
  }
  each_chunk(group, number, [&](const Tensor& tensor, int64_t at, int count, int64_t) {
    kernels.deltas(tensor, at, count, true, scratch);
    for (int model = 0; model < like.models; ++model) {
      const float* deltas = scratch.wide + model * CHUNK;
      if (desk.searches[model].found) continue;
      if (tallies[model].values > 0) {
        kernels.tally(deltas, count, tallies[model]);
      } else {
        kernels.census(deltas, count, censuses[model]);
      }
    }
    return false;
  });
  const std::lock_guard<std::mutex> lock(mutex);
  for (int model = 0; model < like.models; ++model) {
    Search& search = desk.searches[model];
    if (search.found) continue;
    for (int i = 0; i < search.tally.values; ++i) {
      search.tally.above[i] += tallies[model].above[i];
      search.tally.equal[i] += tallies[model].equal[i];
      desk.equal(number, model, i) = tallies[model].equal[i];
    }
    if (search.tally.values > 0) continue;
    search.census.above += censuses[model].above;
    for (int bin = 0; bin < BINS; ++bin) search.census.bins[bin] += censuses[model].bins[bin];
  }
}

// One past the element that is the last of its equals to be kept, where not all are.
int64_t end_of_ties(const Group& group, int model, const Kernels& kernels, const Desk& desk, char* block) {
  const Search& search = desk.searches[model];
  int64_t number = 0, left = search.wanted, end = EVERY;
  for (; left > desk.equal(number, model, search.guess); ++number) left -= desk.equal(number, model, search.guess);
  for (const int64_t tiles = tiles_of(group); number < tiles && end == EVERY; ++number) {
    each_chunk(group, number, [&](const Tensor& tensor, int64_t at, int count, int64_t index) {
      const View views[] = {tensor.views[model], tensor.views[tensor.inputs - 1]};
      const Tensor alone = {views, tensor.elements, 1, 1 + tensor.inputs - tensor.models, 0};
      Scratch scratch(block, alone.inputs);
      kernels.deltas(alone, at, count, true, scratch);
      for (int i = 0; i < count; ++i) {
        if (magnitude_of(scratch.wide[i]) == search.magnitude && --left == 0) end = index + i + 1;
      }
      return end != EVERY;
    });
  }
  return std::min(end, elements_of(group));
}

// `over(items, do)` runs do(item, block) for each item, on this worker or on the whole crew.
template <class Over>
void select(const Group& group, const int64_t* ranks, Cut* cuts, const Kernels& kernels, Desk& desk, const Over& over) {
  const int models = group.front().models;
  const int64_t elements = elements_of(group);
  const auto any = [&](bool (*property)(const Search&)) {
    return std::any_of(desk.searches, desk.searches + models, property);
  };

  for (int model = 0; model < models; ++model) {
    const bool bounded = ranks[model] > 0 && ranks[model] < elements;
    Search& search = desk.searches[model];
    search.rank = ranks[model];
    search.found = !bounded;
    search.magnitude = ranks[model] > 0 ? 0 : INFINITE;
    search.wanted = search.equal = 0;
    search.ties_end = ranks[model] > 0 ? EVERY : 0;
    search.tally = {};
  }
  const auto searching = [](const Search& search) { return !search.found; };
  if (any(searching)) over(1, [&](int64_t, char* block) { sample(group, kernels, desk, block, elements); });
  while (any(searching)) {
    over(tiles_of(group), [&](int64_t tile, char* block) { count_tile(group, tile, kernels, desk, block); });
    for (int model = 0; model < models; ++model) {
      if (!desk.searches[model].found) conclude(desk.searches[model]);
    }
  }
  over(1, [&](int64_t, char* block) {
    for (int model = 0; model < models; ++model) {
      Search& search = desk.searches[model];
      const bool look = search.wanted < search.equal && search.ties_end == EVERY;
      if (look) search.ties_end = end_of_ties(group, model, kernels, desk, block);
      cuts[model] = {from_bits(search.magnitude), search.ties_end};
    }
  });
}

int64_t bytes_read(const Group& group) {
  int64_t bytes = 0;
  for (const Tensor& tensor : group) bytes += bytes_read(tensor, tensor.elements);
  return bytes;
}

}  // namespace

void threshold(const std::vector<Group>& groups, const std::vector<const int64_t*>& ranks,
               const std::vector<Cut*>& cuts, const Crew& crew) {
  const Kernels& kernels = *crew.kernels;
  std::vector<size_t> alone;
  size_t desk_bytes = 0, block_bytes = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    if (elements_of(groups[g]) > ALONE) continue;
    const Tensor& like = groups[g].front();
    alone.push_back(g);
    desk_bytes = std::max(desk_bytes, (Desk::bytes(like.models, tiles_of(groups[g])) + 63) / 64 * 64);
    block_bytes = std::max(block_bytes, worker_bytes(like));
  }
  parallel(static_cast<int64_t>(alone.size()), crew.threads, desk_bytes + block_bytes, crew.tick,
           [&](int64_t item, char* memory) {
             const size_t g = alone[static_cast<size_t>(item)];
             Desk desk(memory, groups[g].front().models);
             char* block = memory + desk_bytes;
             select(groups[g], ranks[g], cuts[g], kernels, desk, [&](int64_t items, const auto& work) {
               for (int64_t at = 0; at < items; ++at) work(at, block);
             });
             return bytes_read(groups[g]);
           });
  for (size_t g = 0; g < groups.size(); ++g) {
    if (elements_of(groups[g]) <= ALONE) continue;
    const Tensor& like = groups[g].front();
    std::vector<char> memory(Desk::bytes(like.models, tiles_of(groups[g])));
    Desk desk(memory.data(), like.models);
    select(groups[g], ranks[g], cuts[g], kernels, desk, [&](int64_t items, const auto& work) {
      parallel(
          items, crew.threads, worker_bytes(like), [&](int64_t) { crew.tick(0); },
          [&](int64_t item, char* block) {
            work(item, block);
            return int64_t{0};
          });
    });
    crew.tick(bytes_read(groups[g]));
  }
}

}  // namespace fastmerge
