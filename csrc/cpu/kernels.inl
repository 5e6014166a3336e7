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
  const uint8_t* kept;
  bool rescaled;  // some part's rescale is not 1
  char* out;
};

template <int n>
struct Vectors {
  static constexpr int count = n;
};

// One sweep over [from, to) of a chunk; both are multiples of the width. The output is float32, or of the inputs' own
// dtype. Reads models (+ 1) x size_of(dtype) bytes per element, and writes one element.
template <DType dtype, bool has_base, bool same_dtype, Keep keep, Elect elect, Mass by>
uint32_t sweep_run(const Call& call, int from, int to) {
  constexpr DType out_dtype = same_dtype ? dtype : DType::F32;
  constexpr int size = dtype == DType::F32 ? 4 : 2, out_size = out_dtype == DType::F32 ? 4 : 2;
  // A NaN or Inf that is dropped or outvoted never reaches the output: then the deltas are looked at themselves.
  constexpr bool may_hide = keep != Keep::ALL || elect == Elect::PLAIN || elect == Elect::COUNT;
  const Sweep& sweep = *call.sweep;
  const F divisor = L::set(sweep.divisor == 0.0f ? 1.0f : sweep.divisor), lambda = L::set(sweep.lambda);
  const F least_positive = L::set(sweep.tie_vote == static_cast<uint8_t>(TieVote::ZERO) ? from_bits(1) : 0.0f);
  const bool divide = sweep.divisor != 1.0f;
  const int models = call.models;
  const bool rescaled = call.rescaled;
  U worst = L::word(0);

  const auto base_at = [&](int at) { return has_base ? L::read<dtype>(call.inputs[models] + at * size) : L::zero(); };
  const auto kept_delta = [&](int model, int at, F base) {
    const F value = L::read<dtype>(call.inputs[model] + at * size);
    F delta = has_base ? value - base : value;
    if (may_hide) worst = L::max(worst, L::magnitude(delta));
    if constexpr (keep == Keep::ABOVE) {
      const U threshold = L::load(call.thresholds + model * SUM_LANES);
      delta = L::where(L::at_least(L::magnitude(delta), threshold), delta);
    } else if constexpr (keep == Keep::BERNOULLI) {
      delta = L::where(L::mask_at(call.kept + model * (CHUNK / 8), at), delta);
    }
    return rescaled ? delta * L::set(call.parts[model].rescale) : delta;
  };
  const auto finish = [&](int at, F base, F mean) {
    const F out = combine<L, has_base>(base, mean * lambda);
    worst = L::max(worst, L::magnitude(out));
    L::write<out_dtype>(call.out + at * out_size, out);
  };

  // Vectors are worked on two by two where two make a cache line: each line is then asked for once, and not again after
  // the lines of all other inputs, which may lie where the first cache can't hold all of them.
  constexpr int together = size == 2 && L::width > 1 ? 2 : 1;
  const auto in_steps = [&](int start, int end, const auto& step) {
    int at = start;
    for (; at + together * L::width <= end; at += together * L::width) step(at, Vectors<together>());
    for (; at < end; at += L::width) step(at, Vectors<1>());
  };

  if constexpr (elect == Elect::NONE) {
    in_steps(from, to, [&](int start, auto vectors) {
      F bases[vectors.count], sums[vectors.count];
      for (int v = 0; v < vectors.count; ++v) bases[v] = base_at(start + v * L::width);
      for (int v = 0; v < vectors.count; ++v) {
        sums[v] = kept_delta(0, start + v * L::width, bases[v]) * L::set(call.parts[0].weight);
      }
      for (int model = 1; model < models; ++model) {
        const F weight = L::set(call.parts[model].weight);
        for (int v = 0; v < vectors.count; ++v) {
          sums[v] = sums[v] + kept_delta(model, start + v * L::width, bases[v]) * weight;
        }
      }
      for (int v = 0; v < vectors.count; ++v) {
        finish(start + v * L::width, bases[v], divide ? sums[v] / divisor : sums[v]);
      }
    });
  } else {
    // Two short loops instead of one long: a chain of so many operations would keep the processor waiting for itself.
    constexpr int block = 16 * L::width;
    float sums[block], masses[block];
    for (int start = from; start < to; start += block) {
      const int end = start + block < to ? start + block : to;
      in_steps(start, end, [&](int first, auto vectors) {
        Ballot<L> ballots[vectors.count];
        F bases[vectors.count];
        for (int v = 0; v < vectors.count; ++v) bases[v] = base_at(first + v * L::width);
        for (int model = 0; model < models; ++model) {
          const F weight = L::set(call.parts[model].weight), mass = L::set(call.parts[model].mass);
          for (int v = 0; v < vectors.count; ++v) {
            const F delta = kept_delta(model, first + v * L::width, bases[v]);
            vote<L, elect, by>(ballots[v], delta, delta * weight, mass);
          }
        }
        for (int v = 0; v < vectors.count; ++v) {
          F mass = divisor;
          const int at = first + v * L::width - start;
          L::store(sums + at, elected<L, by>(ballots[v], least_positive, mass));
          if (by != Mass::DIVISOR) L::store(masses + at, mass);
        }
      });
      for (int at = start; at < end; at += L::width) {
        const F sum = L::load(sums + (at - start));
        finish(at, base_at(at), by == Mass::DIVISOR ? sum / divisor : sum / L::load(masses + (at - start)));
      }
    }
  }

  uint32_t lanes[L::width], largest = 0;
  L::store(lanes, worst);
  for (const uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

using Run = uint32_t (*)(const Call&, int, int);
constexpr int VOTES = 10;  // no election, or one of three kinds with one of three masses

// index = (((dtype x 2 + has_base) x 2 + same_dtype) x 3 + keep) x VOTES + vote
template <size_t index>
constexpr Run run_at() {
  constexpr size_t vote = index % VOTES, keep = index / VOTES % 3, inputs = index / VOTES / 3;
  constexpr auto elect = static_cast<Elect>((vote + 2) / 3);
  constexpr auto by = static_cast<Mass>(vote == 0 ? 0 : (vote - 1) % 3);
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
  const size_t vote = sweep.elect == 0 ? 0 : (sweep.elect - 1u) * 3 + 1 + static_cast<size_t>(by);
  const size_t stages = ((static_cast<size_t>(dtype) * 2 + has_base) * 2 + same_dtype) * 3 + sweep.keep;
  return run_of(stages * VOTES + vote, std::make_index_sequence<3 * 2 * 2 * 3 * VOTES>());
}

// Points at the chunk where it lies; or at widened copies where dtypes differ or a vector would read past the tensor.
// Returns whether it lies in place.
bool point(const Tensor& tensor, int64_t begin, int count, Scratch& scratch) {
  bool in_place = count % SUM_LANES == 0;
  for (int input = 1; input < tensor.inputs; ++input) in_place &= tensor.views[input].dtype == tensor.views[0].dtype;
  for (int input = 0; input < tensor.inputs; ++input) {
    float* copy = scratch.wide + input * CHUNK;
    if (!in_place) widen(tensor.views[input], begin, count, copy);
    scratch.inputs[input] = in_place ? bytes_of(tensor.views[input], begin) : reinterpret_cast<const char*>(copy);
  }
  return in_place;
}

void draw(const Part& part, int64_t begin, int count, uint8_t* kept) {
  if (part.cut >> 32) {
    memset(kept, 0xff, CHUNK / 8);
    return;
  }
  const uint32_t upper = static_cast<uint32_t>(part.cut >> 16);
  constexpr int step = L::draws_at_once;
  const P m0 = L::wide(PHILOX_M0), m1 = L::wide(PHILOX_M1);
  P keys[PHILOX_ROUNDS][2];
  for (uint32_t round = 0; round < PHILOX_ROUNDS; ++round) {
    keys[round][0] = L::wide(static_cast<uint32_t>(part.key) + round * PHILOX_W0);
    keys[round][1] = L::wide(static_cast<uint32_t>(part.key >> 32) + round * PHILOX_W1);
  }
  uint8_t equal[step / 8];
  for (int at = 0; at < count; at += step) {
    const uint64_t counter = static_cast<uint64_t>(begin + at) / 8;
    P x[4] = {L::counters(static_cast<uint32_t>(counter)), L::wide(static_cast<uint32_t>(counter >> 32)), L::wide(0),
              L::wide(0)};
    for (const auto& key : keys) {  // only the lower halves of the lanes count; what is above them is never looked at
      const P p0 = L::product(x[0], m0), p1 = L::product(x[2], m1);
      x[0] = L::exclusive_or(L::upper(p1), x[1], key[0]);
      x[1] = p1;
      x[2] = L::exclusive_or(L::upper(p0), x[3], key[1]);
      x[3] = p0;
    }
    if (!L::draws(x, upper, kept + at / 8, equal)) continue;
    for (int element = 0; element < step; ++element) {
      if (!((equal[element / 8] >> (element % 8)) & 1)) continue;
      const int bit = kept_on_equal(begin + at + element, part.key, part.cut);
      kept[(at + element) / 8] = static_cast<uint8_t>(kept[(at + element) / 8] | bit << (element % 8));
    }
  }
}

// Calls `run(from, to)` over the chunk in pieces within which each model's threshold is the same in every vector:
// equals are kept below ties_end, so T before it, T + 1 after it, and a mixture in the vector where it falls.
template <class Each>
void each_threshold(const Part* parts, int models, int64_t begin, int count, uint32_t* thresholds, const Each& run) {
  const int end = padded(count);
  for (int at = 0, until; at < end; at = until) {
    until = end;
    for (int model = 0; model < models; ++model) {
      const uint32_t magnitude = to_bits(parts[model].magnitude);
      const int64_t ties = parts[model].ties_end - begin - at;  // equals in lanes below this stay
      for (int lane = 0; lane < L::width; ++lane) {
        thresholds[model * SUM_LANES + lane] = lane < ties ? magnitude : magnitude + 1;
      }
      if (ties > 0 && ties < end - at) {
        const int next = at + (ties < L::width ? L::width : static_cast<int>(ties) / L::width * L::width);
        until = next < until ? next : until;
      }
    }
    run(at, until);
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

uint32_t merge(const Tensor& tensor, const Sweep& sweep, const Part* parts, int64_t begin, int count, DType out_dtype,
               char* out, Scratch& scratch) {
  const bool in_place = point(tensor, begin, count, scratch);
  const DType dtype = in_place ? dtype_of(tensor.views[0]) : DType::F32;
  const bool direct = in_place && dtype == out_dtype;
  const Run run = run_of(dtype, base_of(tensor) != nullptr, direct, sweep);
  bool rescaled = false;
  for (int model = 0; model < tensor.models; ++model) rescaled |= parts[model].rescale != 1.0f;
  const Call call = {scratch.inputs,     tensor.models, &sweep,   parts,
                     scratch.thresholds, scratch.kept,  rescaled, direct ? out : reinterpret_cast<char*>(scratch.out)};
  uint32_t worst = 0;
  if (sweep.keep == static_cast<uint8_t>(Keep::ABOVE)) {
    each_threshold(parts, tensor.models, begin, count, scratch.thresholds, [&](int from, int to) {
      const uint32_t here = run(call, from, to);
      worst = here > worst ? here : worst;
    });
  } else {
    for (int model = 0; sweep.keep == static_cast<uint8_t>(Keep::BERNOULLI) && model < tensor.models; ++model) {
      draw(parts[model], begin, count, scratch.kept + model * (CHUNK / 8));
    }
    worst = run(call, 0, padded(count));
  }
  if (!direct) narrow(scratch.out, count, out_dtype, out);
  return worst;
}

// --- measures ---

// float64 sums over SUM_LANES interleaved lanes, added up in one fixed order.
template <class L>
struct Sum {
  using F = typename L::F;
  using D = typename L::D;
  static constexpr int per_vector = L::width == 1 ? 1 : 2;
  static constexpr int vectors = SUM_LANES / L::width;
  D lanes[vectors * per_vector];

  Sum() {
    for (D& lane : lanes) lane = L::no_sum();
  }
  // Products of float32 are exact in float64, so fused or not the bits are the same.
  void add(int vector, F a, F b) {
    D* lane = lanes + vector * per_vector;
    lane[0] = L::multiply_add(L::low(a), L::low(b), lane[0]);
    if constexpr (per_vector == 2) lane[1] = L::multiply_add(L::high(a), L::high(b), lane[1]);
  }
  double total() const {
    double each[SUM_LANES];
    for (int i = 0; i < vectors * per_vector; ++i) L::store(each + i * SUM_LANES / (vectors * per_vector), lanes[i]);
    for (int step = SUM_LANES / 2; step > 0; step /= 2) {
      for (int lane = 0; lane < step; ++lane) each[lane] += each[lane + step];
    }
    return each[0];
  }
};

void gram(int models, int count, const Scratch& scratch, double* sums) {
  for (int row = 0; row < models; ++row) {
    for (int column = row; column < models; ++column) {
      const float *a = scratch.wide + row * CHUNK, *b = scratch.wide + column * CHUNK;
      Sum<L> sum;
      for (int at = 0; at < padded(count); at += SUM_LANES) {
        for (int vector = 0; vector < Sum<L>::vectors; ++vector) {
          const int from = at + vector * L::width;
          sum.add(vector, L::load(a + from), L::load(b + from));
        }
      }
      sums[row * models + column] += sum.total();
    }
  }
}

// Adds L1 and the square of L2, and takes the maximum of Linf, of `values` to sums[3].
void add_norms(const float* values, int count, double* sums) {
  Sum<L> l1, squares;
  U largest = L::word(0);
  for (int at = 0; at < padded(count); at += SUM_LANES) {
    for (int vector = 0; vector < Sum<L>::vectors; ++vector) {
      const F value = L::load(values + at + vector * L::width);
      l1.add(vector, L::absolute(value), L::set(1.0f));
      squares.add(vector, value, value);
      largest = L::max(largest, L::magnitude(value));
    }
  }
  uint32_t lanes[L::width];
  L::store(lanes, largest);
  sums[0] += l1.total();
  sums[1] += squares.total();
  for (const uint32_t lane : lanes) sums[2] = from_bits(lane) > sums[2] ? from_bits(lane) : sums[2];
}

void norms(const Tensor& tensor, const Sweep& sweep, const Part* parts, int64_t begin, int count, Scratch& scratch,
           double* sums) {
  for (int model = 0; model < tensor.models; ++model) {
    float* values = scratch.wide + model * CHUNK;
    add_norms(values, count, sums + model * 6);
    if (sweep.keep == static_cast<uint8_t>(Keep::ABOVE)) {
      each_threshold(parts + model, 1, begin, count, scratch.thresholds, [&](int from, int to) {
        for (int at = from; at < to; at += L::width) {
          const F delta = L::load(values + at);
          L::store(values + at, L::where(L::at_least(L::magnitude(delta), L::load(scratch.thresholds)), delta));
        }
      });
    } else if (sweep.keep == static_cast<uint8_t>(Keep::BERNOULLI)) {
      draw(parts[model], begin, count, scratch.kept);
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

}  // namespace

extern const Kernels FASTMERGE_KERNELS;
const Kernels FASTMERGE_KERNELS = {L::name, merge, deltas, gram, norms, census, tally};

}  // namespace fastmerge
