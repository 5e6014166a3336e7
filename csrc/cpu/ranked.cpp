// The op `merge_ranked`: selection and sweep in one read.
//
// Deltas of 16-bit weights are discrete: often a per cent or more of them equal the k-th largest magnitude. So a guess
// at that magnitude, and at the index up to which its equals are kept, can be right. The sweep runs with a guess and
// counts, chunk by chunk, what lies above the magnitude and what equals it. The guess comes from a small sample; it is
// mended by the counts of one unit in sixteen, which is swept early; where the index may lie is left for the end, and
// then better known by the counts of all the rest; and those of all units prove the magnitude and tell the true index.
// What was swept with an index on the other side of the true one is swept again: a few per cent. Where deltas are not
// like that, a tensor is small, or the guess was wrong, two reads are made.
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
constexpr double MARGIN = 8, NEAR = 1;  // standard deviations: of the sample's magnitudes, of the index
constexpr int SWEEPS = 3;

// When a unit is swept: one in so many EARLY; where the equals of some model may end by the guess that these allow, in
// the MIDDLE, last.
enum Phase { EARLY, OUTER, MIDDLE };

// How far the share of a rank in `count` elements may be from its share in all.
double deviation(double share, double count, double all) {
  return std::sqrt(share * (1 - share) / count * (1 - count / all));
}

// One model's k-th largest magnitude, as bits, and the end of the equals that are kept.
struct Guess {
  bool known;  // all or nothing is kept
  uint32_t magnitude;
  int64_t ties_end[3];         // by phase
  int64_t from, to;            // the middle, in whole units
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
  bool anew = true;   // a magnitude was guessed anew: what was swept before says nothing
  bool early = true;  // what was swept early is not swept again

  Ranked(const Merge& given, const int64_t* wanted, Cut* found)
      : merge(given), ranks(wanted), cuts(found), guesses(static_cast<size_t>(given.tensor.models)) {
    parts.assign(given.parts, given.parts + given.settings * given.tensor.models);
    merge.parts = parts.data();
    const int64_t chunks = (elements() + CHUNK - 1) / CHUNK;
    if (elements() >= LARGE) counts.each.resize(static_cast<size_t>(chunks * models() * 2));
  }

  Phase phase_of(int64_t at) const {
    if (early && at / UNIT % (elements() < 8 * LARGE ? 8 : 16) == 0) return EARLY;
    const auto near = [at](const Guess& guess) { return !guess.known && guess.from <= at && at < guess.to; };
    return std::any_of(guesses.begin(), guesses.end(), near) ? MIDDLE : OUTER;
  }
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

// An index so far into a tensor; of whole chunks, so that either all or none of a chunk's equals are kept by a guess.
int64_t chunk_at(double share, int64_t elements) {
  return static_cast<int64_t>(std::clamp(share, 0.0, 1.0) * static_cast<double>(elements) / CHUNK + 0.5) * CHUNK;
}

// Equal magnitudes of a sample, and how far into them a place in it lies.
struct Run {
  uint32_t magnitude;
  double length, into;
};

// The run that most likely holds a place which may be off by its spread.
Run likeliest(const std::vector<uint32_t>& near, double place, double spread) {
  const auto before = [&](auto edge) {  // twice the probability
    return std::erfc((place - static_cast<double>(edge - near.begin())) / (spread * std::sqrt(2.0)));
  };
  Run best = {};
  double highest = -1;
  for (auto run = near.begin(), next = run; run < near.end(); run = next) {
    next = std::upper_bound(run, near.end(), *run, std::greater<uint32_t>());
    const double probability = before(next) - before(run), length = static_cast<double>(next - run);
    if (probability <= highest) continue;
    highest = probability;
    best = {*run, length, (place - static_cast<double>(run - near.begin())) / length};
  }
  return best;
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
      std::fill_n(guess.ties_end, 3, rank <= 0 ? 0 : EVERY);
      continue;
    }
    const double place = ranked.share(model) * SAMPLES;
    const double spread = deviation(ranked.share(model), SAMPLES, static_cast<double>(tensor.elements)) * SAMPLES;
    const auto far = static_cast<int64_t>(MARGIN * spread) + 16, middle = static_cast<int64_t>(place);
    uint32_t* near = samples + model * SAMPLES;
    int64_t count = SAMPLES;
    const int64_t first = std::max<int64_t>(middle - far, 0), last = std::min(middle + far, SAMPLES) - 1;
    const int64_t larger = narrow_to(near, count, first, last);
    guess.near.assign(near, near + count);
    std::sort(guess.near.begin(), guess.near.end(), std::greater<uint32_t>());
    const Run run = likeliest(guess.near, place - static_cast<double>(larger), spread);
    guess.magnitude = run.magnitude;
    guess.ties_end[EARLY] = chunk_at(run.into, tensor.elements);
    int64_t distinct = 1;
    for (size_t at = 1; at < guess.near.size(); ++at) distinct += guess.near[at] != guess.near[at - 1];
    if (distinct > static_cast<int64_t>(guess.near.size()) / 4) ranked.two_reads = true;  // they are not discrete
  }
}

// What the units swept up to a phase say of each model: above its magnitude, and equal to it.
struct Sums {
  int64_t elements, above, equal;
};

Sums sums_of(const Ranked& ranked, int model, Phase phase) {
  Sums sums = {0, 0, 0};
  const int64_t* ties_end = ranked.guesses[static_cast<size_t>(model)].ties_end;
  for (int64_t begin = 0; begin < ranked.elements(); begin += UNIT) {
    const Phase swept = ranked.phase_of(begin);
    if (swept > phase) continue;
    const int64_t end = std::min(begin + UNIT, ranked.elements());
    sums.elements += end - begin;
    for (int64_t chunk = begin / CHUNK; chunk * CHUNK < end; ++chunk) {
      const uint16_t* counts = ranked.counts.each.data() + (chunk * ranked.models() + model) * 2;
      sums.above += counts[0] - (chunk * CHUNK < ties_end[swept] ? counts[1] : 0);
      sums.equal += counts[1];
    }
  }
  return sums;
}

// Puts the middle around an index that may be off by a share of the elements.
void leave_middle(Guess& guess, double off, int64_t elements) {
  const double far = std::min(NEAR * off, 1.0) * static_cast<double>(elements);
  const int64_t units = static_cast<int64_t>(far) / UNIT, unit = guess.ties_end[MIDDLE] / UNIT;
  guess.from = (unit - units) * UNIT;
  guess.to = (unit + units + 1) * UNIT;
}

// A better guess, from what was counted up to a phase. True where the magnitude is another one now.
bool mend(Guess& guess, const Sums& sums, double share, Phase phase, int64_t elements) {
  const double count = static_cast<double>(sums.elements), equal = static_cast<double>(sums.equal);
  const double wanted = share * count - static_cast<double>(sums.above);
  const double spread = deviation(share, count, static_cast<double>(elements));
  double into = wanted / equal, off = spread * count / equal;
  bool anew = false;
  if (wanted < 0.5 || wanted > equal + 0.5) {
    const auto edges =
        std::equal_range(guess.near.begin(), guess.near.end(), guess.magnitude, std::greater<uint32_t>());
    const auto edge = (wanted < 0.5 ? edges.first : edges.second) - guess.near.begin();
    const double past = (wanted < 0.5 ? wanted : wanted - equal) / count * SAMPLES;
    const double doubt = spread * SAMPLES + std::sqrt(std::abs(past)) + 1;
    const Run run = likeliest(guess.near, static_cast<double>(edge) + past, doubt);
    anew = run.magnitude != guess.magnitude;
    guess.magnitude = run.magnitude;
    into = run.into;
    off = doubt / run.length;
  }
  guess.ties_end[MIDDLE] = chunk_at(into, elements);
  if (anew || phase == EARLY) {
    guess.ties_end[OUTER] = guess.ties_end[MIDDLE];
    leave_middle(guess, off, elements);
  }
  return anew;
}

// The same for all models; where one has another magnitude, all is to be swept anew.
void mend(Ranked& ranked, Phase phase) {
  std::vector<Sums> sums;
  for (int model = 0; model < ranked.models(); ++model) sums.push_back(sums_of(ranked, model, phase));
  for (int model = 0; model < ranked.models(); ++model) {
    const Sums& counted = sums[static_cast<size_t>(model)];
    Guess& guess = ranked.guess(model);
    if (guess.known || counted.elements == 0) continue;
    ranked.anew |= mend(guess, counted, ranked.share(model), phase, ranked.elements());
  }
  for (Guess& guess : ranked.guesses) {
    if (ranked.anew && phase == EARLY) guess.ties_end[EARLY] = guess.ties_end[MIDDLE];
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

// Leaves those of the sample that a guess is too small for, or too large.
void rule_out(Guess& guess, bool too_small) {
  const auto run = std::equal_range(guess.near.begin(), guess.near.end(), guess.magnitude, std::greater<uint32_t>());
  if (too_small) {
    guess.near.erase(run.first, guess.near.end());
  } else {
    guess.near.erase(guess.near.begin(), run.second);
  }
}

// The cuts, where the counts of all units prove the magnitudes; else better guesses, for which all is swept anew.
void conclude(Ranked& ranked, const Kernels& kernels, char* block) {
  if (ranked.anew) return;
  for (int model = 0; model < ranked.models(); ++model) {
    Guess& guess = ranked.guess(model);
    Cut& cut = ranked.cuts[model];
    cut = {from_bits(guess.magnitude), guess.ties_end[MIDDLE]};
    if (guess.known) continue;
    const Sums sums = sums_of(ranked, model, MIDDLE);
    const int64_t wanted = ranked.ranks[model] - sums.above;
    if (wanted < 1 || wanted > sums.equal) {
      rule_out(guess, wanted < 1);
      ranked.anew = true;
      ranked.two_reads |= guess.near.empty();
    } else {
      cut.ties_end = wanted == sums.equal ? EVERY : end_of_ties(ranked, model, wanted, kernels, block);
    }
  }
  if (ranked.anew && !ranked.two_reads) mend(ranked, MIDDLE);
}

// The stretches of so many elements that are to be swept, neighbours as one.
template <class Wanted>
void cover_where(const Ranked& ranked, int64_t step, const Wanted& wanted, const Crew& crew, Counts* counts,
                 std::vector<Tile>& tiles) {
  int64_t from = -1;
  for (int64_t begin = 0; begin < ranked.elements(); begin += step) {
    const bool now = wanted(begin, std::min(begin + step, ranked.elements()));
    if (now && from < 0) from = begin;
    if (!now && from >= 0) {
      cover(ranked.merge, from, begin, crew, counts, tiles);
      from = -1;
    }
  }
  if (from >= 0) cover(ranked.merge, from, ranked.elements(), crew, counts, tiles);
}

// The parts, as small as may be, in which some model's equals were kept or left out wrongly.
void cover_wrong(const Ranked& ranked, const Crew& crew, std::vector<Tile>& tiles) {
  const auto wrong = [&](int64_t begin, int64_t end) {
    const Phase phase = ranked.phase_of(begin);
    for (int model = 0; model < ranked.models(); ++model) {
      const int64_t swept = ranked.guesses[static_cast<size_t>(model)].ties_end[phase];
      const int64_t ties_end = ranked.cuts[model].ties_end;
      if (std::min(swept, ties_end) < end && std::max(swept, ties_end) > begin && swept != ties_end) return true;
    }
    return false;
  };
  cover_where(ranked, grain(ranked.merge, crew), wrong, crew, nullptr, tiles);
}

void cover_phase(Ranked& ranked, Phase phase, const Crew& crew, std::vector<Tile>& tiles) {
  const auto due = [&](int64_t begin, int64_t) { return ranked.phase_of(begin) == phase; };
  cover_where(ranked, UNIT, due, crew, &ranked.counts, tiles);
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
      if (ranked->anew ? phase == MIDDLE : phase == EARLY) continue;
      if (ranked->anew && phase == OUTER) ranked->early = false;
      ranked->anew = false;
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
  for (int sweeps = 0; sweeps < SWEEPS; ++sweeps) {
    sweep_phase(EARLY);
    for_each([&](Ranked& ranked, char*) { mend(ranked, EARLY); });
  }
  std::vector<Ranked*> right;
  for (int sweeps = 0; sweeps < SWEEPS && !one_read.empty(); ++sweeps) {
    sweep_phase(OUTER);
    for_each([&](Ranked& ranked, char*) { mend(ranked, OUTER); });
    sweep_phase(MIDDLE);
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
