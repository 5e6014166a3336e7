// The loops over a chunk, written once in Lanes and compiled for each instruction set by its isa_*.cpp.
#include <cstring>
#include <utility>

#include "kernels.h"
#include "simd.h"

namespace fastmerge {
namespace {

using L = Lanes;
using F = L::F;
using U = L::U;
using D = L::D;
using M = L::M;
using P = L::P;

int padded(int count) {
  return (count + SUM_LANES - 1) / SUM_LANES * SUM_LANES;
}

// --- widening: elements to float32, the last vector padded with zeros ---

template <DType dtype, class Put>
void each_vector(const char* from, int count, const Put& put) {
  constexpr int size = dtype == DType::F32 ? 4 : 2;
  int at = 0;
  for (; at + L::width <= count; at += L::width) put(at, L::read<dtype>(from + at * size));
  char rest[SUM_LANES * 4] = {};
  memcpy(rest, from + at * size, static_cast<size_t>(count - at) * size);
  for (int end = padded(count), start = at; at < end; at += L::width)
    put(at, L::read<dtype>(rest + (at - start) * size));
}

template <class Put>
void each_vector(const View& view, int64_t begin, int count, const Put& put) {
  const char* from = bytes_of(view, begin);
  switch (dtype_of(view)) {
    case DType::F32: return each_vector<DType::F32>(from, count, put);
    case DType::F16: return each_vector<DType::F16>(from, count, put);
    case DType::BF16: return each_vector<DType::BF16>(from, count, put);
    case DType::U8: return;
  }
}

void widen(const View& view, int64_t begin, int count, float* to) {
  each_vector(view, begin, count, [to](int at, F value) { L::store(to + at, value); });
}

void deltas(const Tensor& tensor, int64_t begin, int count, bool infinite_too, Scratch& scratch) {
  const View* base = base_of(tensor);
  float* origin = scratch.wide + tensor.models * CHUNK;
  if (base) widen(*base, begin, count, origin);
  const U largest = L::word(infinite_too ? INFINITE : INFINITE - 1);
  for (int model = 0; model < tensor.models; ++model) {
    float* to = scratch.wide + model * CHUNK;
    each_vector(tensor.views[model], begin, count, [=](int at, F value) {
      const F delta = base ? value - L::load(origin + at) : value;
      L::store(to + at, L::where(L::at_least(largest, L::magnitude(delta)), delta));
    });
  }
}

// --- merge ---

struct Call {
  const char* const* inputs;  // the models', then the base's, at the first element of the chunk
  int models;
  const Sweep* sweep;
  const Part* parts;
  const uint32_t* thresholds;
  const float* tops;
  const uint8_t* kept;
  bool rescaled;          // some part's rescale is not 1
  const Output* outputs;  // those past the caches start a line
  int settings;
  uint32_t* counts;  // [models][2] or nullptr: of elements above each part's magnitude and equal to it
};

// Lines are asked for so many bytes before they are read, a page: that is where the processor's own guesses end.
constexpr int AHEAD = 4096;

uint32_t count_of(M mask) {
  return static_cast<uint32_t>(__builtin_popcount(L::bits(mask)));
}

uint32_t largest_of(U magnitudes) {
  uint32_t lanes[L::width], largest = 0;
  L::store(lanes, magnitudes);
  for (const uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// What is at least its threshold and below its top, or a NaN; 0 elsewhere.
F in_band(F delta, const uint32_t* thresholds, const float* tops) {
  const F below = L::where(L::not_ge(L::absolute(delta), L::load(tops)), delta);
  return L::where(L::at_least(L::magnitude(delta), L::load(thresholds)), below);
}

F clipped(F delta, const Part& part) {
  return L::clip(delta, L::set(-part.magnitude), L::set(part.magnitude));
}

// One sweep over [from, to) of a chunk, whole lines. The outputs are float32, or of the inputs' own dtype. Reads models
// (+ 1) x size_of(dtype) bytes per element, and writes one element per setting.
template <DType dtype, bool has_base, bool same_dtype, Keep keep, Elect elect, Mass by>
uint32_t sweep_run(const Call& call, int from, int to) {
  constexpr int size = dtype == DType::F32 ? 4 : 2;
  constexpr int vectors = L::vectors<dtype>, line = vectors * L::width;
  // A NaN or Inf that is dropped or outvoted never reaches the output: then the deltas are looked at themselves.
  constexpr bool may_hide = keep != Keep::ALL || elect == Elect::PLAIN || elect == Elect::COUNT;
  const Sweep& sweep = *call.sweep;
  const F divisor = L::set(sweep.divisor == 0.0f ? 1.0f : sweep.divisor);
  const F least_positive = L::set(sweep.tie_vote == static_cast<uint8_t>(TieVote::ZERO) ? from_bits(1) : 0.0f);
  const bool divide = sweep.divisor != 1.0f;
  const int models = call.models;
  const bool rescaled = call.rescaled;
  U worst = L::word(0);

  const auto read = [&](int input, int at, F* values) {
    const char* place = call.inputs[input] + at * size;
    __builtin_prefetch(place + AHEAD);
    L::read_line<dtype>(place, values);
  };
  const auto read_base = [&](int at, F* bases) {
    if constexpr (has_base) return read(models, at, bases);
    for (int v = 0; v < vectors; ++v) bases[v] = L::zero();
  };
  const auto kept_deltas = [&](int model, int at, const F* bases, F* deltas) {
    read(model, at, deltas);
    M masks[vectors];
    if constexpr (keep == Keep::BERNOULLI) L::mask_line<dtype>(call.kept + model * (CHUNK / 8), at, masks);
    for (int v = 0; v < vectors; ++v) {
      if (has_base) deltas[v] = deltas[v] - bases[v];
      if (may_hide) worst = L::max(worst, L::magnitude(deltas[v]));
      if constexpr (keep == Keep::BAND) {
        const int place = model * LINE + v * L::width;
        deltas[v] = in_band(deltas[v], call.thresholds + place, call.tops + place);
      } else if constexpr (keep == Keep::CLIP) {
        deltas[v] = clipped(deltas[v], call.parts[model]);
      } else if constexpr (keep == Keep::ABOVE) {
        const U threshold = L::load(call.thresholds + model * LINE + v * L::width);
        const U magnitude = L::magnitude(deltas[v]);
        masks[v] = L::at_least(magnitude, threshold);
        if (call.counts) {
          const U cut = L::word(to_bits(call.parts[model].magnitude));
          const uint32_t not_below = count_of(L::at_least(magnitude, cut)), equal = count_of(L::equal(magnitude, cut));
          call.counts[model * 2] += not_below - equal;
          call.counts[model * 2 + 1] += equal;
        }
      }
      if (rescaled) deltas[v] = deltas[v] * L::set(call.parts[model].rescale);
      if constexpr (keep == Keep::ABOVE || keep == Keep::BERNOULLI) deltas[v] = L::where(masks[v], deltas[v]);
    }
  };
  const auto means_at = [&](int at, const F* bases, F* means) {
    F deltas[vectors];
    if constexpr (elect == Elect::NONE) {
      constexpr bool counted = by == Mass::CONTRIBUTORS;
      F counts[vectors];
      kept_deltas(0, at, bases, means);
      for (int v = 0; v < vectors; ++v) {
        means[v] = means[v] * L::set(call.parts[0].weight);
        if (counted) counts[v] = contributors<L>(L::zero(), means[v]);
      }
      for (int model = 1; model < models; ++model) {
        const F weight = L::set(call.parts[model].weight);
        kept_deltas(model, at, bases, deltas);
        for (int v = 0; v < vectors; ++v) {
          const F term = deltas[v] * weight;
          means[v] = means[v] + term;
          if (counted) counts[v] = contributors<L>(counts[v], term);
        }
      }
      for (int v = 0; v < vectors; ++v) {
        if (counted) means[v] = means[v] / one_if_zero<L>(counts[v]);
        if (!counted && divide) means[v] = means[v] / divisor;
      }
    } else {
      Ballot<L> ballots[vectors];
      for (int model = 0; model < models; ++model) {
        const F weight = L::set(call.parts[model].weight), mass = L::set(call.parts[model].mass);
        kept_deltas(model, at, bases, deltas);
        for (int v = 0; v < vectors; ++v) vote<L, elect, by>(ballots[v], deltas[v], deltas[v] * weight, mass);
      }
      for (int v = 0; v < vectors; ++v) {
        F mass = divisor;
        const F sum = elected<L, by>(ballots[v], least_positive, mass);
        means[v] = by == Mass::DIVISOR && !divide ? sum : sum / mass;
      }
    }
  };
  const auto finish = [&](int at, const F* bases, const F* means, F lambda, const Output& output) {
    F out[vectors];
    for (int v = 0; v < vectors; ++v) {
      out[v] = combine<L, has_base>(bases[v], means[v] * lambda);
      worst = L::max(worst, L::magnitude(out[v]));
    }
    if constexpr (same_dtype) return L::write_line<dtype>(output.to + at * size, out, output.past_caches);
    L::in_order<dtype>(out);
    for (int v = 0; v < vectors; ++v) L::write<DType::F32>(output.to + (at + v * L::width) * 4, out[v]);
  };

  if (elect == Elect::NONE && !has_base && call.settings == 1) {
    const F lambda = L::set(call.outputs->lambda);
    for (int at = from; at < to; at += line) {
      F bases[vectors], means[vectors];
      read_base(at, bases);
      means_at(at, bases, means);
      finish(at, bases, means, lambda, *call.outputs);
    }
    return largest_of(worst);
  }
  // Short loops instead of one long: a chain of so many operations would keep the processor waiting for itself, and
  // lines written one after another cost less than lines written between reads.
  constexpr int block = 16 * L::width;
  float block_means[block];
  for (int start = from; start < to; start += block) {
    const int end = start + block < to ? start + block : to;
    for (int at = start; at < end; at += line) {
      F bases[vectors], means[vectors];
      read_base(at, bases);
      means_at(at, bases, means);
      for (int v = 0; v < vectors; ++v) L::store(block_means + at - start + v * L::width, means[v]);
    }
    for (const Output* output = call.outputs; output < call.outputs + call.settings; ++output) {
      const F lambda = L::set(output->lambda);
      for (int at = start; at < end; at += line) {
        F bases[vectors], means[vectors];
        read_base(at, bases);
        for (int v = 0; v < vectors; ++v) means[v] = L::load(block_means + at - start + v * L::width);
        finish(at, bases, means, lambda, *output);
      }
    }
  }
  return largest_of(worst);
}

// One model as it is: the bytes of whole lines, and the largest magnitude among them.
template <DType dtype>
uint32_t copy_run(const Call& call, int count) {
  constexpr int size = dtype == DType::F32 ? 4 : 2, vectors = L::vectors<dtype>;
  U worst = L::word(0);
  for (int at = 0; at < count; at += vectors * L::width) {
    const char* from = call.inputs[0] + at * size;
    F line[vectors];
    __builtin_prefetch(from + AHEAD);
    L::read_line<dtype>(from, line);
    for (int v = 0; v < vectors; ++v) worst = L::max(worst, L::magnitude(line[v]));
    L::copy_line<dtype>(from, call.outputs->to + at * size, call.outputs->past_caches);
  }
  return largest_of(worst);
}

uint32_t copy_run(DType dtype, const Call& call, int count) {
  switch (dtype) {
    case DType::F32: return copy_run<DType::F32>(call, count);
    case DType::F16: return copy_run<DType::F16>(call, count);
    case DType::BF16: return copy_run<DType::BF16>(call, count);
    case DType::U8: return INFINITE;
  }
  return INFINITE;
}

bool leaves_alone(const Tensor& tensor, const Sweep& sweep, const Part& part) {
  return tensor.inputs == 1 && sweep.keep == 0 && sweep.elect == 0 && part.weight == 1.0f && part.rescale == 1.0f &&
         (sweep.divisor == 1.0f || sweep.divisor == 0.0f);
}

using Run = uint32_t (*)(const Call&, int, int);
constexpr int KEEPS = 5;
constexpr int VOTES = 4 * 3;  // no election, or one of three kinds; with one of three masses

// index = (((dtype x 2 + has_base) x 2 + same_dtype) x KEEPS + keep) x VOTES + vote
template <size_t index>
constexpr Run run_at() {
  constexpr size_t vote = index % VOTES, keep = index / VOTES % KEEPS, inputs = index / VOTES / KEEPS;
  constexpr auto elect = static_cast<Elect>(vote / 3);
  constexpr auto by = mass_of(elect, static_cast<Mass>(vote % 3));
  return sweep_run<static_cast<DType>(inputs / 4), inputs / 2 % 2 == 1, inputs % 2 == 1, static_cast<Keep>(keep), elect,
                   by>;
}

template <size_t... index>
Run run_of(size_t chosen, std::index_sequence<index...>) {
  static constexpr Run runs[] = {run_at<index>()...};
  return runs[chosen];
}

Run run_of(DType dtype, bool has_base, bool same_dtype, const Sweep& sweep) {
  const auto mean = static_cast<Mean>(sweep.mean);
  const auto by = mean == Mean::SUM ? Mass::DIVISOR : mean == Mean::CONTRIBUTORS ? Mass::CONTRIBUTORS : Mass::AGREEING;
  const size_t vote = sweep.elect * size_t{3} + static_cast<size_t>(by);
  const size_t stages = ((static_cast<size_t>(dtype) * 2 + has_base) * 2 + same_dtype) * KEEPS + sweep.keep;
  return run_of(stages * VOTES + vote, std::make_index_sequence<3 * 2 * 2 * KEEPS * VOTES>());
}

// Points at the chunk where it lies; or at widened copies where dtypes differ or a line would end past the tensor.
// Returns whether it lies in place.
bool point(const Tensor& tensor, int64_t begin, int count, Scratch& scratch) {
  bool in_place = count % LINE == 0;
  for (int input = 1; input < tensor.inputs; ++input) in_place &= tensor.views[input].dtype == tensor.views[0].dtype;
  for (int input = 0; input < tensor.inputs; ++input) {
    float* copy = scratch.wide + input * CHUNK;
    if (!in_place) widen(tensor.views[input], begin, count, copy);
    scratch.inputs[input] = in_place ? bytes_of(tensor.views[input], begin) : reinterpret_cast<const char*>(copy);
  }
  return in_place;
}

// A few counters abreast, or each would wait for its own products.
constexpr int ABREAST = 4;

void draw(const Part& part, int64_t begin, int count, uint8_t* kept) {
  if (part.cut >> 32) {
    memset(kept, 0xff, CHUNK / 8);
    return;
  }
  const uint32_t upper = static_cast<uint32_t>(part.cut >> 16);
  constexpr int step = ABREAST * L::draws_at_once;
  const P m0 = L::wide(PHILOX_M0), m1 = L::wide(PHILOX_M1);
  P keys[PHILOX_ROUNDS][2];
  for (uint32_t round = 0; round < PHILOX_ROUNDS; ++round) {
    keys[round][0] = L::wide(static_cast<uint32_t>(part.key) + round * PHILOX_W0);
    keys[round][1] = L::wide(static_cast<uint32_t>(part.key >> 32) + round * PHILOX_W1);
  }
  for (int at = 0; at < count; at += step) {
    const uint64_t counter = static_cast<uint64_t>(begin + at) / 8;
    P words[ABREAST][4];
    for (int i = 0; i < ABREAST; ++i) {
      words[i][0] = L::counters(static_cast<uint32_t>(counter) + static_cast<uint32_t>(i) * L::draws_at_once / 8);
      words[i][1] = L::wide(static_cast<uint32_t>(counter >> 32));
      words[i][2] = words[i][3] = L::wide(0);
    }
    for (const auto& key : keys) {  // only the lower halves of the lanes count; what is above them is never looked at
      for (P(&x)[4] : words) {
        const P p0 = L::product(x[0], m0), p1 = L::product(x[2], m1);
        x[0] = L::exclusive_or(L::upper(p1), x[1], key[0]);
        x[1] = p1;
        x[2] = L::exclusive_or(L::upper(p0), x[3], key[1]);
        x[3] = p0;
      }
    }
    bool equal = false;
    for (int i = 0; i < ABREAST; ++i) equal |= L::draws(words[i], upper, kept + (at + i * L::draws_at_once) / 8);
    for (int element = at; equal && element < at + step; ++element) {
      if (!equals_upper(begin + element, part.key, upper)) continue;
      const int bit = kept_on_equal(begin + element, part.key, part.cut);
      kept[element / 8] = static_cast<uint8_t>(kept[element / 8] | bit << (element % 8));
    }
  }
}

// Calls `run(from, to)` over the chunk in pieces within which each model's threshold is the same in every line: equals
// are kept below ties_end, so T before it, T + 1 after it, and a mixture in the line where it falls. So it is with the
// tops of a band.
template <DType dtype, class Each>
void each_threshold(const Part* parts, int models, bool band, int64_t begin, int count, const Scratch& scratch,
                    const Each& run) {
  constexpr int vectors = L::vectors<dtype>, line = vectors * L::width;
  const int end = padded(count);
  for (int at = 0, until; at < end; at = until) {
    until = end;
    const auto set = [&](float magnitude, int64_t ties_end, auto* thresholds) {
      const int64_t ties = ties_end - begin - at;  // equals among elements below this are above
      for (int v = 0; v < vectors; ++v) {
        for (int lane = 0; lane < L::width; ++lane) {
          const uint32_t least = to_bits(magnitude) + (L::element<dtype>(v, lane) >= ties);
          memcpy(thresholds + v * L::width + lane, &least, sizeof least);
        }
      }
      if (ties > 0 && ties < end - at) {
        const int next = at + (ties < line ? line : static_cast<int>(ties) / line * line);
        until = next < until ? next : until;
      }
    };
    for (int model = 0; model < models; ++model) {
      const Part& part = parts[model];
      set(part.magnitude, part.ties_end, scratch.thresholds + model * LINE);
      if (band) set(part.top_magnitude, part.top_ties_end, scratch.tops + model * LINE);
    }
    run(at, until);
  }
}

template <class Each>
void each_threshold(DType dtype, const Part* parts, int models, bool band, int64_t begin, int count,
                    const Scratch& scratch, const Each& run) {
  switch (dtype) {
    case DType::F32: return each_threshold<DType::F32>(parts, models, band, begin, count, scratch, run);
    case DType::F16: return each_threshold<DType::F16>(parts, models, band, begin, count, scratch, run);
    case DType::BF16: return each_threshold<DType::BF16>(parts, models, band, begin, count, scratch, run);
    case DType::U8: return;
  }
}

template <DType dtype>
void narrow(const float* from, int count, char* to) {
  constexpr int size = dtype == DType::F32 ? 4 : 2;
  int at = 0;
  for (; at + L::width <= count; at += L::width) L::write<dtype>(to + at * size, L::load(from + at));
  if (at >= count) return;
  char rest[L::width * 4];
  L::write<dtype>(rest, L::load(from + at));
  memcpy(to + at * size, rest, static_cast<size_t>(count - at) * size);
}

void narrow(const float* from, int count, DType dtype, char* to) {
  switch (dtype) {
    case DType::F32: return narrow<DType::F32>(from, count, to);
    case DType::F16: return narrow<DType::F16>(from, count, to);
    case DType::BF16: return narrow<DType::BF16>(from, count, to);
    case DType::U8: return;
  }
}

uint32_t merge(const Tensor&, const Sweep&, const Part*, int64_t begin, int count, DType, const Output*, int settings,
               uint16_t* counts, Scratch&);

uint32_t one_by_one(const Tensor& tensor, const Sweep& sweep, const Part* parts, int64_t begin, int count,
                    DType out_dtype, const Output* outputs, int settings, uint16_t* counts, Scratch& scratch) {
  uint32_t worst = 0;
  for (int setting = 0; setting < settings; ++setting) {
    const uint32_t here = merge(tensor, sweep, parts, begin, count, out_dtype, outputs + setting, 1, counts, scratch);
    worst = here > worst ? here : worst;
  }
  return worst;
}

uint32_t merge(const Tensor& tensor, const Sweep& sweep, const Part* parts, int64_t begin, int count, DType out_dtype,
               const Output* outputs, int settings, uint16_t* counts, Scratch& scratch) {
  const bool in_place = point(tensor, begin, count, scratch);
  const DType dtype = in_place ? dtype_of(tensor.views[0]) : DType::F32;
  const bool direct = in_place && dtype == out_dtype;
  if (!direct && settings > 1)
    return one_by_one(tensor, sweep, parts, begin, count, out_dtype, outputs, settings, counts, scratch);
  const Output wide = {outputs->lambda, reinterpret_cast<char*>(scratch.out), false};
  const Run run = run_of(dtype, base_of(tensor) != nullptr, direct, sweep);
  bool rescaled = false;
  for (int model = 0; model < tensor.models; ++model) rescaled |= parts[model].rescale != 1.0f;
  uint32_t* sums = counts ? scratch.counts : nullptr;
  memset(scratch.counts, 0, static_cast<size_t>(tensor.models) * 8);
  Call call = {scratch.inputs,           tensor.models, &sweep,       parts,
               scratch.thresholds,       scratch.tops,  scratch.kept, rescaled,
               direct ? outputs : &wide, settings,      sums};
  uint32_t worst = 0;
  if (direct && settings == 1 && outputs->lambda == 1.0f && leaves_alone(tensor, sweep, *parts)) {
    worst = copy_run(dtype, call, count);
    if (worst < INFINITE) return worst;
  }
  const auto keep = static_cast<Keep>(sweep.keep);
  if (keep == Keep::ABOVE || keep == Keep::BAND) {
    each_threshold(dtype, parts, tensor.models, keep == Keep::BAND, tensor.begin + begin, count, scratch,
                   [&](int from, int to) {
                     const uint32_t here = run(call, from, to);
                     worst = here > worst ? here : worst;
                   });
  } else {
    for (int model = 0; keep == Keep::BERNOULLI && model < tensor.models; ++model) {
      draw(parts[model], tensor.begin + begin, count, scratch.kept + model * (CHUNK / 8));
    }
    worst = run(call, 0, padded(count));
  }
  if (!direct) narrow(scratch.out, count, out_dtype, outputs->to);
  for (int i = 0; counts && i < tensor.models * 2; ++i) {
    const bool padding_is_equal = i % 2 == 1 && parts[i / 2].magnitude == 0.0f;
    counts[i] = static_cast<uint16_t>(sums[i] - static_cast<uint32_t>(padding_is_equal ? padded(count) - count : 0));
  }
  return worst;
}

// --- measures ---

// A float64 sum over SUM_LANES interleaved lanes, which are added up in one fixed order; its D are in the order in
// which lines of `dtype` come.
template <DType dtype>
struct Sum {
  static constexpr int width = L::width == 1 ? 1 : L::width / 2;  // of a D
  static constexpr int count = SUM_LANES / width;
  static constexpr bool sorted = L::vectors<dtype> == 1 || L::element<dtype>(1, 0) != 1;
  D parts[count];

  Sum() {
    for (D& part : parts) part = L::no_sum();
  }
  // The part of half a vector, from the place of its line among the lanes.
  static constexpr int part_of(int line, int vector, int half) {
    const int first = (line + L::element<dtype>(vector, half * width)) % SUM_LANES;
    return sorted ? first / width : first % 2 * (count / 2) + first / (2 * width);
  }
  // Products of float32 are exact in float64, so fused or not the bits are the same.
  void add(int part, D a, D b) { parts[part] = L::multiply_add(a, b, parts[part]); }
  double total() const {
    double each[SUM_LANES], stored[width];
    for (int part = 0; part < count; ++part) {
      L::store(stored, parts[part]);
      for (int i = 0; i < width; ++i) {
        each[sorted ? part * width + i : part / (count / 2) + 2 * (part % (count / 2) * width + i)] = stored[i];
      }
    }
    for (int step = SUM_LANES / 2; step > 0; step /= 2) {
      for (int lane = 0; lane < step; ++lane) each[lane] += each[lane + step];
    }
    return each[0];
  }
};

constexpr int HALVES = L::width == 1 ? 1 : 2;  // float64 lanes are half as many

template <class L>
typename L::D half_of(typename L::F value, int half) {
  if constexpr (HALVES == 2) {
    if (half == 1) return L::high(value);
  }
  return L::low(value);
}

// All inner products of a few models, in one read. What is not finite counts as 0 where it is `looked` for; else
// nothing is added then, and the answer is no.
template <DType dtype, int models, bool has_base, bool looked>
bool gram_run(const char* const* inputs, int count, double* sums) {
  constexpr int size = dtype == DType::F32 ? 4 : 2, vectors = L::vectors<dtype>, line = vectors * L::width;
  constexpr int step = line < SUM_LANES ? SUM_LANES : line;
  const U largest = L::word(INFINITE - 1);
  Sum<dtype> products[models * (models + 1) / 2];
  for (int start = 0; start < count; start += step) {
    for (int at = 0; at < step; at += line) {
      F deltas[models][vectors], bases[vectors];
      const int place = (start + at) * size;
      if (has_base) L::read_line<dtype>(inputs[models] + place, bases);
      for (int model = 0; model < models; ++model) {
        __builtin_prefetch(inputs[model] + place + AHEAD);
        L::read_line<dtype>(inputs[model] + place, deltas[model]);
        for (int v = 0; v < vectors; ++v) {
          if (has_base) deltas[model][v] = deltas[model][v] - bases[v];
          if (looked)
            deltas[model][v] = L::where(L::at_least(largest, L::magnitude(deltas[model][v])), deltas[model][v]);
        }
      }
      for (int v = 0; v < vectors; ++v) {
        for (int half = 0; half < HALVES; ++half) {
          D wide[models];
          for (int model = 0; model < models; ++model) wide[model] = half_of<L>(deltas[model][v], half);
          Sum<dtype>* product = products;
          for (int row = 0; row < models; ++row) {
            for (int column = row; column < models; ++column) {
              (product++)->add(Sum<dtype>::part_of(at, v, half), wide[row], wide[column]);
            }
          }
        }
      }
    }
  }
  double totals[models * (models + 1) / 2];
  bool finite = true;
  for (int i = 0; i < models * (models + 1) / 2; ++i) {
    totals[i] = products[i].total();
    finite &= totals[i] * 0.0 == 0.0;
  }
  if (!finite) return false;
  const double* total = totals;
  for (int row = 0; row < models; ++row) {
    for (int column = row; column < models; ++column) sums[row * models + column] += *total++;
  }
  return true;
}

template <DType dtype, int models, bool has_base>
void gram_run(const char* const* inputs, int count, double* sums) {
  if (gram_run<dtype, models, has_base, false>(inputs, count, sums)) return;
  gram_run<dtype, models, has_base, true>(inputs, count, sums);
}

template <DType dtype, int models>
void gram_run(const char* const* inputs, bool has_base, int count, double* sums) {
  return has_base ? gram_run<dtype, models, true>(inputs, count, sums)
                  : gram_run<dtype, models, false>(inputs, count, sums);
}

template <DType dtype>
void gram_run(const char* const* inputs, int models, bool has_base, int count, double* sums) {
  switch (models) {
    case 1: return gram_run<dtype, 1>(inputs, has_base, count, sums);
    case 2: return gram_run<dtype, 2>(inputs, has_base, count, sums);
    case 3: return gram_run<dtype, 3>(inputs, has_base, count, sums);
    case 4: return gram_run<dtype, 4>(inputs, has_base, count, sums);
  }
}

// More models than registers: pair after pair, from float32 deltas that lie in the first cache.
void gram_of_many(int models, int count, const Scratch& scratch, double* sums) {
  for (int row = 0; row < models; ++row) {
    for (int column = row; column < models; ++column) {
      const float *a = scratch.wide + row * CHUNK, *b = scratch.wide + column * CHUNK;
      Sum<DType::F32> sum;
      for (int start = 0; start < padded(count); start += SUM_LANES) {
        for (int at = 0; at < SUM_LANES; at += L::width) {
          const F x = L::load(a + start + at), y = L::load(b + start + at);
          for (int half = 0; half < HALVES; ++half) {
            sum.add(Sum<DType::F32>::part_of(at, 0, half), half_of<L>(x, half), half_of<L>(y, half));
          }
        }
      }
      sums[row * models + column] += sum.total();
    }
  }
}

void gram(const Tensor& tensor, int64_t begin, int count, Scratch& scratch, double* sums) {
  if (tensor.models > 4) {
    deltas(tensor, begin, count, false, scratch);
    return gram_of_many(tensor.models, count, scratch, sums);
  }
  const bool in_place = point(tensor, begin, count, scratch), has_base = base_of(tensor) != nullptr;
  const int whole = padded(count);
  switch (in_place ? dtype_of(tensor.views[0]) : DType::F32) {
    case DType::F32: return gram_run<DType::F32>(scratch.inputs, tensor.models, has_base, whole, sums);
    case DType::F16: return gram_run<DType::F16>(scratch.inputs, tensor.models, has_base, whole, sums);
    case DType::BF16: return gram_run<DType::BF16>(scratch.inputs, tensor.models, has_base, whole, sums);
    case DType::U8: return;
  }
}

// Adds L1 and the square of L2, and takes the maximum of Linf, of `values` to sums[3].
void add_norms(const float* values, int count, double* sums) {
  Sum<DType::F32> l1, squares;
  U largest = L::word(0);
  for (int start = 0; start < padded(count); start += SUM_LANES) {
    for (int at = 0; at < SUM_LANES; at += L::width) {
      const F value = L::load(values + start + at);
      for (int half = 0; half < HALVES; ++half) {
        const int part = Sum<DType::F32>::part_of(at, 0, half);
        const D wide = half_of<L>(value, half);
        l1.add(part, half_of<L>(L::absolute(value), half), half_of<L>(L::set(1.0f), half));
        squares.add(part, wide, wide);
      }
      largest = L::max(largest, L::magnitude(value));
    }
  }
  sums[0] += l1.total();
  sums[1] += squares.total();
  const double linf = from_bits(largest_of(largest));
  sums[2] = linf > sums[2] ? linf : sums[2];
}

void norms(const Tensor& tensor, const Sweep& sweep, const Part* parts, int64_t begin, int count, Scratch& scratch,
           double* sums) {
  const auto keep = static_cast<Keep>(sweep.keep);
  for (int model = 0; model < tensor.models; ++model) {
    float* values = scratch.wide + model * CHUNK;
    add_norms(values, count, sums + model * 6);
    if (keep == Keep::ABOVE) {
      each_threshold<DType::F32>(parts + model, 1, false, tensor.begin + begin, count, scratch, [&](int from, int to) {
        for (int at = from; at < to; at += L::width) {
          const F delta = L::load(values + at);
          L::store(values + at, L::where(L::at_least(L::magnitude(delta), L::load(scratch.thresholds)), delta));
        }
      });
    } else if (keep == Keep::BAND) {
      each_threshold<DType::F32>(parts + model, 1, true, tensor.begin + begin, count, scratch, [&](int from, int to) {
        for (int at = from; at < to; at += L::width) {
          L::store(values + at, in_band(L::load(values + at), scratch.thresholds, scratch.tops));
        }
      });
    } else if (keep == Keep::CLIP) {
      for (int at = 0; at < padded(count); at += L::width) {
        L::store(values + at, clipped(L::load(values + at), parts[model]));
      }
    } else if (keep == Keep::BERNOULLI) {
      draw(parts[model], tensor.begin + begin, count, scratch.kept);
      for (int at = 0; at < padded(count); at += L::width) {
        L::store(values + at, L::where(L::mask_at(scratch.kept, at), L::load(values + at)));
      }
    }
    add_norms(values, count, sums + model * 6 + 3);
  }
}

void census(const float* deltas, int count, Census& census) {
  const U low = L::word(census.low), beyond = L::word(census.high + 1);
  uint32_t magnitudes[L::width];
  for (int at = 0; at < padded(count); at += L::width) {
    const U magnitude = L::magnitude(L::load(deltas + at));
    const uint32_t over = L::bits(L::at_least(magnitude, beyond));
    uint32_t inside = L::bits(L::at_least(magnitude, low)) & ~over;
    census.above += __builtin_popcount(over);
    if (!inside) continue;
    L::store(magnitudes, magnitude);
    for (; inside; inside &= inside - 1) {
      ++census.bins[(magnitudes[__builtin_ctz(inside)] - census.low) >> census.shift];
    }
  }
  if (census.low == 0) census.bins[0] -= padded(count) - count;
}

void tally(const float* deltas, int count, Tally& tally) {
  for (int i = 0; i < tally.values; ++i) {
    const U value = L::word(tally.value[i]), beyond = L::word(tally.value[i] + 1);
    int64_t above = 0, equal = 0;
    for (int at = 0; at < padded(count); at += L::width) {
      const U magnitude = L::magnitude(L::load(deltas + at));
      above += __builtin_popcount(L::bits(L::at_least(magnitude, beyond)));
      equal += __builtin_popcount(L::bits(L::equal(magnitude, value)));
    }
    tally.above[i] += above;
    tally.equal[i] += tally.value[i] == 0 ? equal - (padded(count) - count) : equal;
  }
}

// Counts in float32, which holds every whole number up to 2^24.
int64_t count_at_least(uint32_t least, const uint32_t* magnitudes, int64_t count) {
  constexpr int abreast = 4;
  const U value = L::word(least);
  F sums[abreast];
  for (F& sum : sums) sum = L::zero();
  int64_t at = 0;
  for (; at + abreast * L::width <= count; at += abreast * L::width) {
    for (int i = 0; i < abreast; ++i) {
      sums[i] = L::add_where(sums[i], L::at_least(L::load(magnitudes + at + i * L::width), value), L::set(1.0f));
    }
  }
  int64_t many = 0;
  for (; at < count; ++at) many += magnitudes[at] >= least;
  float lanes[L::width];
  L::store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (const float lane : lanes) many += static_cast<int64_t>(lane);
  return many;
}

// Bit by bit from above; bits that no magnitude has, which are most where weights are of 16 bits, need no look.
Kth kth(const uint32_t* magnitudes, int64_t count, int64_t k) {
  uint32_t ever = 0, found = 0;
  for (int64_t at = 0; at < count; ++at) ever |= magnitudes[at];
  int64_t not_below = count;
  for (uint32_t bit = 1u << 30; bit > 0; bit >>= 1) {
    if (!(ever & bit)) continue;
    const int64_t many = count_at_least(found | bit, magnitudes, count);
    if (many < k) continue;
    found |= bit;
    not_below = many;
  }
  const int64_t above = count_at_least(found + 1, magnitudes, count);
  return {found, above, not_below - above};
}

#include "lowrank.inl"

}  // namespace

extern const Kernels FASTMERGE_KERNELS;
const Kernels FASTMERGE_KERNELS = {L::name, merge, deltas, gram, norms, census, tally, kth, lowrank};

}  // namespace fastmerge
