// The op `merge_ranked`: selection and sweep in one read.
//
// Deltas of 16-bit weights are discrete: often a per cent or more of them equal the k-th largest magnitude. So a guess
// at that magnitude, and at the index up to which its equals are kept, can be right. The sweep runs with a guess and
// counts, chunk by chunk, what lies above the magnitude and what equals it. The guess comes from a small sample; it is
// mended by the counts of one unit in sixteen, which is swept first; and the counts of all units prove the magnitude
// and tell the true index. What was swept with an index on the other side of the true one is swept again: a few per
// cent. Where deltas are not like that, a tensor is small, or the guess was wrong, two reads are made.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "samples.h"
#include "tiles.h"

namespace fastmerge {
namespace {

constexpr int64_t EVERY = std::numeric_limits<int64_t>::max();
constexpr int64_t LARGE = 1 << 19;                             // elements; below, the second read finds them in a cache
constexpr int64_t RUN = 32, RUNS = 256, SAMPLES = RUN * RUNS;  // a run is a line of each input; they lie evenly apart
constexpr int64_t UNIT = 8 * CHUNK;
static_assert(UNIT * 2 % PIECE == 0, "a unit fills whole pieces of every output that may be hashed");
constexpr double MARGIN = 8;  // standard deviations
constexpr int SWEEPS = 3;

enum Phase { AT_FIRST, LATER };

// How far the share of a rank in `count` elements may be from its share in all.
double deviation(double share, double count) {
  return std::sqrt(share * (1 - share) / count);
}

// One model's k-th largest magnitude, as bits, and the end of the equals that are kept.
struct Guess {
  bool known;  // all or nothing is kept
  uint32_t magnitude;
  int64_t ties_end[2];         // at first and later
  std::vector<uint32_t> near;  // magnitudes of the sample near the rank, descending
};

struct Ranked {
  Merge merge;  // with parts of its own
  const int64_t* ranks;
  Cut* cuts;
  std::vector<Part> parts;
  std::vector<Guess> guesses;
  Counts counts;
  bool two_reads = false;
  bool anew = false;  // a magnitude was guessed anew: what was swept before says nothing

  Ranked(const Merge& given, const int64_t* wanted, Cut* found)
      : merge(given), ranks(wanted), cuts(found), guesses(static_cast<size_t>(given.tensor.models)) {
    parts.assign(given.parts, given.parts + given.settings * given.tensor.models);
    merge.parts = parts.data();
    const int64_t chunks = (elements() + CHUNK - 1) / CHUNK;
    if (elements() >= LARGE) counts.each.resize(static_cast<size_t>(chunks * models() * 2));
  }

  // One unit in so many is swept first.
  int64_t period() const { return elements() < 8 * LARGE ? 8 : 16; }
  bool is_early(int64_t begin) const { return begin / UNIT % period() == 0; }
  int models() const { return merge.tensor.models; }
  int64_t elements() const { return merge.tensor.elements; }
  Guess& guess(int model) { return guesses[static_cast<size_t>(model)]; }
  double share(int model) const { return static_cast<double>(ranks[model]) / static_cast<double>(elements()); }

  void cut(int model, float magnitude, int64_t ties_end) {
    for (int setting = 0; setting < merge.settings; ++setting) {
      Part& part = parts[static_cast<size_t>(setting * models() + model)];
      part.magnitude = magnitude;
      part.ties_end = ties_end;
    }
  }
};

// Guesses the magnitude at a place in `near`, and the end of its equals: as far into its run as the place is.
void guess_at(Guess& guess, int64_t place, int64_t elements, Phase phase) {
  const auto at = guess.near.begin() + std::clamp<int64_t>(place, 0, static_cast<int64_t>(guess.near.size()) - 1);
  const auto run = std::equal_range(guess.near.begin(), guess.near.end(), *at, std::greater<uint32_t>());
  const double into = static_cast<double>(at - run.first + 1) / static_cast<double>(run.second - run.first);
  guess.magnitude = *at;
  guess.ties_end[phase] = static_cast<int64_t>(into * static_cast<double>(elements));
}

// A worker's memory: the kernels' scratch, then the samples of each model.
size_t samples_at(const Tensor& tensor) {
  return (Scratch::bytes(tensor.inputs) + 63) / 64 * 64;
}

size_t worker_bytes(const Tensor& tensor) {
  return samples_at(tensor) + static_cast<size_t>(tensor.models * SAMPLES) * sizeof(uint32_t);
}

void look_ahead(Ranked& ranked, const Kernels& kernels, char* block) {
  const Tensor& tensor = ranked.merge.tensor;
  const int64_t stride = tensor.elements / RUNS;
  // Nothing is owned here: where an input is cut, this is left by a jump.
  uint32_t* const samples = reinterpret_cast<uint32_t*>(block + samples_at(tensor));
  Scratch scratch(block, tensor.inputs);
  constexpr int64_t AHEAD = 8;  // runs: each is a miss of its own
  for (int64_t run = -AHEAD; run < RUNS; ++run) {
    for (int input = 0; input < tensor.inputs && run + AHEAD < RUNS; ++input) {
      __builtin_prefetch(bytes_of(tensor.views[input], (run + AHEAD) * stride));
    }
    if (run < 0) continue;
    kernels.deltas(tensor, run * stride, RUN, true, scratch);
    for (int model = 0; model < tensor.models; ++model) {
      uint32_t* to = samples + model * SAMPLES + run * RUN;
      for (int i = 0; i < RUN; ++i) to[i] = to_bits(scratch.wide[model * CHUNK + i]) & 0x7fffffff;
    }
  }
  for (int model = 0; model < tensor.models; ++model) {
    Guess& guess = ranked.guess(model);
    const int64_t rank = ranked.ranks[model];
    guess.known = rank <= 0 || rank >= tensor.elements;
    if (guess.known) {
      guess.magnitude = rank <= 0 ? INFINITE : 0;
      guess.ties_end[AT_FIRST] = guess.ties_end[LATER] = rank <= 0 ? 0 : EVERY;
      continue;
    }
    const double share = ranked.share(model);
    const auto place = static_cast<int64_t>(share * SAMPLES);
    const auto margin = static_cast<int64_t>(MARGIN * deviation(share, SAMPLES) * SAMPLES) + 16;
    uint32_t* near = samples + model * SAMPLES;
    int64_t count = SAMPLES;
    const int64_t first = std::max<int64_t>(place - margin, 0), last = std::min(place + margin, SAMPLES) - 1;
    const int64_t larger = narrow_to(near, count, first, last);
    guess.near.assign(near, near + count);
    std::sort(guess.near.begin(), guess.near.end(), std::greater<uint32_t>());
    guess_at(guess, place - larger, tensor.elements, AT_FIRST);
    int64_t distinct = 1;
    for (size_t at = 1; at < guess.near.size(); ++at) distinct += guess.near[at] != guess.near[at - 1];
    if (distinct > static_cast<int64_t>(guess.near.size()) / 4) ranked.two_reads = true;  // they are not discrete
  }
}

// What the units swept so far say of each model: above its magnitude, and equal to it.
struct Sums {
  int64_t elements, above, equal;
};

Sums sums_of(const Ranked& ranked, int model, Phase phase) {
  Sums sums = {0, 0, 0};
  const uint16_t* counts = ranked.counts.each.data() + model * 2;
  for (int64_t begin = 0; begin < ranked.elements(); begin += CHUNK, counts += ranked.models() * 2) {
    if (phase == AT_FIRST && !ranked.is_early(begin)) continue;
    sums.elements += std::min<int64_t>(CHUNK, ranked.elements() - begin);
    sums.above += counts[0];
    sums.equal += counts[1];
  }
  return sums;
}

// Better guesses, from what was swept at first or from all.
void mend(Ranked& ranked, Phase phase) {
  for (int model = 0; model < ranked.models(); ++model) {
    Guess& guess = ranked.guess(model);
    if (guess.known) continue;
    const Sums sums = sums_of(ranked, model, phase);
    const double count = static_cast<double>(sums.elements), share = ranked.share(model);
    const double wanted = share * count - static_cast<double>(sums.above), equal = static_cast<double>(sums.equal);
    if (equal > 0 && wanted >= 0 && wanted <= equal) {
      guess.ties_end[LATER] = static_cast<int64_t>(wanted / equal * static_cast<double>(ranked.elements()));
    } else {
      const auto run =
          std::equal_range(guess.near.begin(), guess.near.end(), guess.magnitude, std::greater<uint32_t>());
      const double past = (wanted < 0 ? wanted : wanted - equal) / count * SAMPLES;
      const auto edge = wanted < 0 ? run.first : run.second;
      guess_at(guess, edge - guess.near.begin() + static_cast<int64_t>(std::floor(past)), ranked.elements(), LATER);
      ranked.anew = true;
    }
    ranked.cut(model, from_bits(guess.magnitude), guess.ties_end[LATER]);
  }
  for (int model = 0; model < ranked.models() && ranked.anew; ++model) {
    ranked.guess(model).ties_end[AT_FIRST] = ranked.guess(model).ties_end[LATER];
  }
}

// One past the element that is the last of so many equals.
int64_t end_of_ties(const Ranked& ranked, int model, int64_t wanted, const Kernels& kernels, char* block) {
  const Tensor& tensor = ranked.merge.tensor;
  const uint16_t* counts = ranked.counts.each.data() + model * 2 + 1;
  int64_t begin = 0;
  for (; wanted > *counts; counts += tensor.models * 2, begin += CHUNK) wanted -= *counts;
  Scratch scratch(block, tensor.inputs);
  const int count = static_cast<int>(std::min<int64_t>(CHUNK, tensor.elements - begin));
  kernels.deltas(tensor, begin, count, true, scratch);
  const uint32_t magnitude = to_bits(ranked.cuts[model].magnitude);
  for (int i = 0; i < count; ++i) {
    if ((to_bits(scratch.wide[model * CHUNK + i]) & 0x7fffffff) == magnitude && --wanted == 0) return begin + i + 1;
  }
  return tensor.elements;
}

// The cuts, where the counts of all units prove the magnitudes; else better guesses, for which all is swept anew.
void conclude(Ranked& ranked, const Kernels& kernels, char* block) {
  ranked.anew = false;
  for (int model = 0; model < ranked.models(); ++model) {
    const Guess& guess = ranked.guess(model);
    Cut& cut = ranked.cuts[model];
    cut = {from_bits(guess.magnitude), guess.ties_end[LATER]};
    if (guess.known) continue;
    const Sums sums = sums_of(ranked, model, LATER);
    const int64_t wanted = ranked.ranks[model] - sums.above;
    if (wanted < 1 || wanted > sums.equal) {
      ranked.anew = true;
      return mend(ranked, LATER);
    }
    cut.ties_end = wanted == sums.equal ? EVERY : end_of_ties(ranked, model, wanted, kernels, block);
  }
}

// The parts, as small as may be, in which some model's equals were kept or left out wrongly.
void cover_wrong(Ranked& ranked, const Crew& crew, std::vector<Tile>& tiles) {
  const auto wrong = [&](int64_t begin, int64_t end) {
    for (int model = 0; model < ranked.models(); ++model) {
      const int64_t swept = ranked.guess(model).ties_end[ranked.is_early(begin) ? AT_FIRST : LATER];
      const int64_t ties_end = ranked.cuts[model].ties_end;
      if (std::min(swept, ties_end) < end && std::max(swept, ties_end) > begin && swept != ties_end) return true;
    }
    return false;
  };
  const int64_t step = grain(ranked.merge, crew);
  int64_t from = -1;
  for (int64_t begin = 0; begin < ranked.elements(); begin += step) {
    const bool now = wrong(begin, std::min(begin + step, ranked.elements()));
    if (now && from < 0) from = begin;
    if (!now && from >= 0) {
      cover(ranked.merge, from, begin, crew, nullptr, tiles);
      from = -1;
    }
  }
  if (from >= 0) cover(ranked.merge, from, ranked.elements(), crew, nullptr, tiles);
}

// The units of a phase; all of them where the first was in vain.
void cover_phase(Ranked& ranked, Phase phase, const Crew& crew, std::vector<Tile>& tiles) {
  if (phase == LATER && ranked.anew) return cover(ranked.merge, 0, ranked.elements(), crew, &ranked.counts, tiles);
  for (int64_t begin = 0; begin < ranked.elements(); begin += ranked.period() * UNIT) {
    const int64_t middle = std::min(begin + UNIT, ranked.elements());
    const int64_t end = std::min(begin + ranked.period() * UNIT, ranked.elements());
    if (phase == AT_FIRST) cover(ranked.merge, begin, middle, crew, &ranked.counts, tiles);
    if (phase == LATER) cover(ranked.merge, middle, end, crew, &ranked.counts, tiles);
  }
}

}  // namespace

void merge_ranked(const std::vector<Merge>& merges, const std::vector<const int64_t*>& ranks,
                  const std::vector<Cut*>& cuts, const Crew& crew) {
  std::vector<std::unique_ptr<Ranked>> all;
  std::vector<Ranked*> one_read, two_reads;
  for (size_t t = 0; t < merges.size(); ++t) {
    all.push_back(std::make_unique<Ranked>(merges[t], ranks[t], cuts[t]));
    const bool large = merges[t].tensor.elements >= LARGE && merges[t].settings > 0;
    (large ? one_read : two_reads).push_back(all.back().get());
  }
  const auto part_with = [&](const auto& leaves, std::vector<Ranked*>& to) {
    const auto stays = [&](const Ranked* one) { return !leaves(*one); };
    const auto end = std::stable_partition(one_read.begin(), one_read.end(), stays);
    to.insert(to.end(), end, one_read.end());
    one_read.erase(end, one_read.end());
  };
  const auto for_each = [&](const auto& work) {
    size_t bytes = 0;
    for (const Ranked* ranked : one_read) bytes = std::max(bytes, worker_bytes(ranked->merge.tensor));
    parallel(static_cast<int64_t>(one_read.size()), crew.threads, bytes, crew.tick, [&](int64_t item, char* block) {
      work(*one_read[static_cast<size_t>(item)], block);
      return int64_t{0};
    });
    part_with([](const Ranked& one) { return one.two_reads || one.counts.odd; }, two_reads);
  };
  const auto sweep_phase = [&](Phase phase) {
    std::vector<Tile> tiles;
    for (Ranked* ranked : one_read) {
      for (int model = 0; model < ranked->models(); ++model) {
        const Guess& guess = ranked->guess(model);
        ranked->cut(model, from_bits(guess.magnitude), guess.ties_end[phase]);
      }
      cover_phase(*ranked, phase, crew, tiles);
    }
    sweep(tiles, crew);
  };
  const auto cut_as_found = [](Ranked& ranked) {
    for (int model = 0; model < ranked.models(); ++model) {
      ranked.cut(model, ranked.cuts[model].magnitude, ranked.cuts[model].ties_end);
    }
  };

  for_each([&](Ranked& ranked, char* block) { look_ahead(ranked, *crew.kernels, block); });
  sweep_phase(AT_FIRST);
  for_each([&](Ranked& ranked, char*) { mend(ranked, AT_FIRST); });
  std::vector<Ranked*> right;
  for (int sweeps = 0; sweeps < SWEEPS && !one_read.empty(); ++sweeps) {
    sweep_phase(LATER);
    for_each([&](Ranked& ranked, char* block) { conclude(ranked, *crew.kernels, block); });
    part_with([](const Ranked& one) { return !one.anew; }, right);
  }
  two_reads.insert(two_reads.end(), one_read.begin(), one_read.end());
  std::vector<Tile> wrong;
  for (Ranked* ranked : right) {
    cut_as_found(*ranked);
    cover_wrong(*ranked, crew, wrong);
  }
  Crew silent = crew;  // these bytes have been told of
  silent.tick = [&](int64_t) { crew.tick(0); };
  sweep(wrong, silent);

  std::vector<Group> groups;
  std::vector<const int64_t*> wanted;
  std::vector<Cut*> found;
  for (const Ranked* ranked : two_reads) {
    groups.push_back({ranked->merge.tensor});
    wanted.push_back(ranked->ranks);
    found.push_back(ranked->cuts);
  }
  threshold(groups, wanted, found, crew);
  std::vector<Tile> tiles;
  for (Ranked* ranked : two_reads) {
    cut_as_found(*ranked);
    cover(ranked->merge, 0, ranked->elements(), crew, nullptr, tiles);
  }
  sweep(tiles, crew);
}

}  // namespace fastmerge
