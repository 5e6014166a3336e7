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

constexpr uint32_t INFINITE = 0x7f800000;

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
  float* out;
};

// One sweep over [from, to) of a chunk; both are multiples of the width.
// Reads models (+ 1) x size_of(dtype) bytes per element from memory; the output stays in the first cache.
template <DType dtype, bool has_base, Keep keep, Elect elect, bool contributors>
uint32_t sweep_run(const Call& call, int from, int to) {
  constexpr int size = dtype == DType::F32 ? 4 : 2;
  // A NaN or Inf that is dropped or outvoted never reaches the output: then the deltas are looked at themselves.
  constexpr bool may_hide = keep != Keep::ALL || elect == Elect::PLAIN || elect == Elect::COUNT;
  const Sweep& sweep = *call.sweep;
  const F divisor = L::set(sweep.divisor), lambda = L::set(sweep.lambda);
  const F least_positive = L::set(sweep.tie_vote == static_cast<uint8_t>(TieVote::ZERO) ? from_bits(1) : 0.0f);
  const bool by_mass = sweep.mean != static_cast<uint8_t>(Mean::SUM);
  const bool divide = sweep.divisor != 1.0f && sweep.divisor != 0.0f;  // 0 counts as 1
  U worst = L::word(0);

  for (int at = from; at < to; at += L::width) {
    const F base = has_base ? L::read<dtype>(call.inputs[call.models] + at * size) : L::zero();
    const auto kept_delta = [&](int model) {
      const F value = L::read<dtype>(call.inputs[model] + at * size);
      F delta = has_base ? value - base : value;
      if (may_hide) worst = L::max(worst, L::magnitude(delta));
      if constexpr (keep == Keep::ABOVE) {
        const U threshold = L::load(call.thresholds + model * SUM_LANES);
        delta = L::where(L::at_least(L::magnitude(delta), threshold), delta);
      } else if constexpr (keep == Keep::BERNOULLI) {
        delta = L::where(L::mask_at(call.kept + model * (CHUNK / 8), at), delta);
      }
      return delta * L::set(call.parts[model].rescale);
    };
    F mean;
    if constexpr (elect == Elect::NONE) {
      mean = kept_delta(0) * L::set(call.parts[0].weight);
      for (int model = 1; model < call.models; ++model) {
        mean = mean + kept_delta(model) * L::set(call.parts[model].weight);
      }
      if (divide) mean = mean / divisor;
    } else {
      Ballot<L> ballot;
      for (int model = 0; model < call.models; ++model) {
        const Part& part = call.parts[model];
        const F delta = kept_delta(model);
        vote<L, elect, contributors>(ballot, delta, delta * L::set(part.weight), L::set(part.mass));
      }
      mean = elected<L>(ballot, least_positive, by_mass, divisor);
    }
    const F out = combine<L, has_base>(base, mean, lambda);
    worst = L::max(worst, L::magnitude(out));
    L::store(call.out + at, out);
  }

  uint32_t lanes[L::width], largest = 0;
  L::store(lanes, worst);
  for (const uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

using Run = uint32_t (*)(const Call&, int, int);
constexpr int VOTES = 7;  // no election, or one of three kinds with or without contributors

template <size_t index>
constexpr Run run_at() {
  constexpr int vote = index % VOTES;
  constexpr auto elect = static_cast<Elect>((vote + 1) / 2);
  constexpr auto keep = static_cast<Keep>(index / VOTES % 3);
  return sweep_run < static_cast<DType>(index / VOTES / 6), index / VOTES / 3 % 2 == 1, keep, elect,
         vote != 0 && vote % 2 == 0 > ;
}

template <size_t... index>
Run run_of(size_t chosen, std::index_sequence<index...>) {
  static constexpr Run runs[] = {run_at<index>()...};
  return runs[chosen];
}

Run run_of(DType dtype, bool has_base, const Sweep& sweep) {
  const bool contributors = sweep.mean == static_cast<uint8_t>(Mean::CONTRIBUTORS);
  const size_t vote = sweep.elect == 0 ? 0 : 2 * sweep.elect - 1 + contributors;
  const size_t stages = (static_cast<size_t>(dtype) * 2 + has_base) * 3 + sweep.keep;
  return run_of(stages * VOTES + vote, std::make_index_sequence<3 * 2 * 3 * VOTES>());
}

// Points at the chunk where it lies; or at widened copies where dtypes differ or a vector would read past the tensor.
DType point(const Tensor& tensor, int64_t begin, int count, Scratch& scratch) {
  const DType dtype = dtype_of(tensor.views[0]);
  bool in_place = count % SUM_LANES == 0;
  for (int input = 1; input < tensor.inputs; ++input) in_place &= dtype_of(tensor.views[input]) == dtype;
  for (int input = 0; input < tensor.inputs; ++input) {
    float* copy = scratch.wide + input * CHUNK;
    if (!in_place) widen(tensor.views[input], begin, count, copy);
    scratch.inputs[input] = in_place ? bytes_of(tensor.views[input], begin) : reinterpret_cast<const char*>(copy);
  }
  return in_place ? dtype : DType::F32;
}

void draw(const Part& part, int64_t begin, int count, uint8_t* kept) {
  if (part.cut >> 32) {
    memset(kept, 0xff, CHUNK / 8);
    return;
  }
  const uint32_t upper = static_cast<uint32_t>(part.cut >> 16);
  uint8_t equal[L::width];
  for (int at = 0; at < count; at += 8 * L::width) {
    const uint64_t counter = static_cast<uint64_t>(begin + at) / 8;
    U x[4] = {L::counters(static_cast<uint32_t>(counter)), L::word(static_cast<uint32_t>(counter >> 32)), L::word(0),
              L::word(0)};
    uint32_t k0 = static_cast<uint32_t>(part.key), k1 = static_cast<uint32_t>(part.key >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round, k0 += PHILOX_W0, k1 += PHILOX_W1) {
      U high0, low0, high1, low1;
      L::multiply(x[0], PHILOX_M0, high0, low0);
      L::multiply(x[2], PHILOX_M1, high1, low1);
      x[0] = L::exclusive_or(L::exclusive_or(high1, x[1]), L::word(k0));
      x[1] = low1;
      x[2] = L::exclusive_or(L::exclusive_or(high0, x[3]), L::word(k1));
      x[3] = low0;
    }
    if (!L::draws(x, upper, kept + at / 8, equal)) continue;
    for (int element = 0; element < 8 * L::width; ++element) {
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

uint32_t merge(const Tensor& tensor, const Sweep& sweep, const Part* parts, int64_t begin, int count, float* out,
               Scratch& scratch) {
  const DType dtype = point(tensor, begin, count, scratch);
  const Run run = run_of(dtype, base_of(tensor) != nullptr, sweep);
  const Call call = {scratch.inputs, tensor.models, &sweep, parts, scratch.thresholds, scratch.kept, out};
  if (sweep.keep == static_cast<uint8_t>(Keep::ABOVE)) {
    uint32_t worst = 0;
    each_threshold(parts, tensor.models, begin, count, scratch.thresholds, [&](int from, int to) {
      const uint32_t here = run(call, from, to);
      worst = here > worst ? here : worst;
    });
    return worst;
  }
  if (sweep.keep == static_cast<uint8_t>(Keep::BERNOULLI)) {
    for (int model = 0; model < tensor.models; ++model) {
      draw(parts[model], begin, count, scratch.kept + model * (CHUNK / 8));
    }
  }
  return run(call, 0, padded(count));
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
const Kernels FASTMERGE_KERNELS = {L::name, merge, narrow, deltas, gram, norms, census, tally};

}  // namespace fastmerge
